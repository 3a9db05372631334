"""Whether a model is worse than another on the same clips: differences clip by clip, or class by class."""

import numpy as np

from ..metrics import average_precision


def metric_name(multilabel):
    return "mAP" if multilabel else "top-1"


def unit_scores(logits, targets, multilabel):
    """Numbers whose mean is the metric: 1 or 0 a clip (top-1), or the average precision of each class (mAP).

    Args:
        logits, targets: arrays ``[N, K]``.
        multilabel: whether a clip can have several classes, which makes the metric mAP.

    Returns:
        float64 ``[N]`` or ``[K]``; NaN for a class without a positive clip.
    """
    logits, targets = logits.astype(np.float64), targets > 0.5
    if multilabel:
        return average_precision(logits, targets)
    return targets[np.arange(len(targets)), logits.argmax(1)].astype(np.float64)


def paired_test(differences):
    """Mean of paired differences, its standard error and the two-sided p-value of Student's t-test that it is 0.

    NaN (a class without a positive clip) is left out.
    """
    from scipy.stats import ttest_1samp

    differences = differences[np.isfinite(differences)]
    mean, se = float(differences.mean()), float(differences.std(ddof=1) / np.sqrt(len(differences)))
    p = float(ttest_1samp(differences, 0).pvalue) if se > 0 else float(mean == 0)
    return {"difference": mean, "difference_se": se, "p": p}
