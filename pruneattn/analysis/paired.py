"""Paired comparison of two models on the same clips: differences clip by clip, or class by class."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..metrics import average_precision


def metric_name(multilabel: bool) -> str:
    """Name of the metric: mAP if a clip can have several classes, else top-1."""
    return "mAP" if multilabel else "top-1"


def unit_scores(logits: NDArray[Any], targets: NDArray[Any], multilabel: bool) -> NDArray[np.float64]:
    """Compute numbers whose mean is the metric: 1 or 0 for each clip (top-1), or the average precision of each class.

    Args:
        logits: ``[N, K]``.
        targets: ``[N, K]``.
        multilabel: whether a clip can have several classes; the metric is then mAP.

    Returns:
        float64 ``[N]``, or ``[K]`` if ``multilabel``; NaN for a class without a positive clip.
    """
    logits, targets = logits.astype(np.float64), targets > 0.5
    if multilabel:
        return average_precision(logits, targets)
    return targets[np.arange(len(targets)), logits.argmax(1)].astype(np.float64)


def paired_test(differences: NDArray[np.float64]) -> dict[str, float]:
    """Student's t-test that the mean of paired differences is 0.

    Args:
        differences: ``[N]``; NaN (a class without a positive clip) is omitted.

    Returns:
        dict: ``difference``, the mean; ``difference_se``, its standard error; ``p``, the two-sided p-value.
    """
    from scipy.stats import ttest_1samp

    differences = differences[np.isfinite(differences)]
    mean, se = float(differences.mean()), float(differences.std(ddof=1) / np.sqrt(len(differences)))
    p = float(ttest_1samp(differences, 0).pvalue) if se > 0 else float(mean == 0)
    return {"difference": mean, "difference_se": se, "p": p}
