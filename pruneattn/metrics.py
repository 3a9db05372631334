"""Metrics of predictions: mAP, mAUC, d', top-1 and top-5, overall and for each class."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import UserError

#: Metrics by name, and ``per_class``: a list of dicts.
Metrics = dict[str, Any]

# Classes that are ranked together: limits the working memory to some tens of bytes for each clip and class of a chunk.
_CLASSES_AT_ONCE = 64


def evaluate_predictions(logits: Any, targets: Any, multilabel: bool) -> Metrics:
    """Compute the metrics of the predictions for a whole dataset.

    Args:
        logits: ``[N, K]`` tensor or array, any float type: the model's raw outputs.
        targets: ``[N, K]`` tensor or array; a clip has a label where its value is above 0.5.
        multilabel: whether a clip may have several labels. If so, each class is scored separately (sigmoid), else the
            classes compete (softmax). This decides how the scores of different clips compare.

    Returns:
        dict of floats in 0 to 1 (``dprime`` is unbounded):
        ``map``: macro mean of average precision over the classes that have a positive clip;
        ``mauc``: macro mean of the area under the ROC curve over the classes with positive and negative clips;
        ``dprime``: ``sqrt(2) * ndtri(mauc)`` as AST (Gong et al. 2021) and AudioSet's baselines define it;
        ``top1``, ``top5``: fraction of clips with a correct label among the 1 or ``min(5, K)`` highest scores, where
        the lower class number wins ties;
        ``per_class``: one dict per class with ``label`` (number), ``positives``, ``ap``, ``auc``, ``precision`` and
        ``recall`` (of the highest score, or of probabilities above 0.5 if multilabel). A value that no clip defines is
        NaN.

    Raises:
        UserError: there are no clips, or some outputs are not finite.
        ValueError: the shapes do not match.
    """
    logits, targets = _array(logits), _array(targets) > 0.5
    if logits.ndim != 2 or logits.shape != targets.shape:
        raise ValueError(f"logits and targets must both be [N, K], got {logits.shape} and {targets.shape}")
    clips, classes = logits.shape
    if not clips:
        raise UserError("no clip could be scored: the evaluation set is empty, or every clip of it failed")
    finite = np.isfinite(logits).all(axis=1)
    if not finite.all():
        raise UserError(
            f"{clips - finite.sum()} of {clips} clips got outputs that are not finite: the model has diverged, "
            "or its values are too large for fp16 (try bf16 or fp32)"
        )
    # Log-probabilities rank like probabilities, without the saturation at 0 and 1 that would create ties.
    scores = logits if multilabel else logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    ap, auc = average_precision(scores, targets), roc_auc(scores, targets)

    ranked = np.argsort(-logits, axis=1, kind="stable")[:, :5]  # [N, min(5, K)]
    hits = np.take_along_axis(targets, ranked, axis=1)
    decided = logits > 0 if multilabel else ranked[:, :1] == np.arange(classes)  # [N, K]
    right = (decided & targets).sum(axis=0)
    positives = targets.sum(axis=0)
    with np.errstate(invalid="ignore"):
        precision, recall = right / decided.sum(axis=0), right / positives

    mauc = _mean(auc)
    return {
        "map": _mean(ap),
        "mauc": mauc,
        "dprime": _dprime(mauc),
        "top1": float(hits[:, 0].mean()),
        "top5": float(hits.any(axis=1).mean()),
        "per_class": [
            {
                "label": label,
                "positives": int(positives[label]),
                "ap": float(ap[label]),
                "auc": float(auc[label]),
                "precision": float(precision[label]),
                "recall": float(recall[label]),
            }
            for label in range(classes)
        ],
    }


def average_precision(scores: NDArray[np.floating], targets: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Average precision of each class: ``[N, K]`` scores and booleans -> float64 ``[K]``.

    ``sum_n (R_n - R_{n-1}) P_n`` over the distinct scores, so that clips with the same score count together, as in
    scikit-learn. NaN for a class without positives.
    """

    def chunk(scores: NDArray[np.floating], targets: NDArray[np.bool_]) -> NDArray[np.float64]:
        order = np.argsort(-scores, axis=0, kind="stable")
        _, last = _tie_groups(np.take_along_axis(scores, order, axis=0))
        hit = np.take_along_axis(targets, order, axis=0)
        found = np.take_along_axis(hit.cumsum(axis=0), last, axis=0)
        with np.errstate(invalid="ignore"):
            return (hit * found / (last + 1)).sum(axis=0) / hit.sum(axis=0)

    return _by_chunks(chunk, scores, targets)


def roc_auc(scores: NDArray[np.floating], targets: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Area under the ROC curve of each class: ``[N, K]`` scores and booleans -> float64 ``[K]``.

    The probability that a positive clip ranks above a negative clip, where a tie counts half (Mann-Whitney, from mean
    ranks). NaN for a class without positives or without negatives.
    """

    def chunk(scores: NDArray[np.floating], targets: NDArray[np.bool_]) -> NDArray[np.float64]:
        order = np.argsort(scores, axis=0, kind="stable")
        first, last = _tie_groups(np.take_along_axis(scores, order, axis=0))
        hit = np.take_along_axis(targets, order, axis=0)
        positives = hit.sum(axis=0)
        ranks = (hit * ((first + last) / 2 + 1)).sum(axis=0)
        with np.errstate(invalid="ignore"):
            return (ranks - positives * (positives + 1) / 2) / (positives * (len(scores) - positives))

    return _by_chunks(chunk, scores, targets)


def _tie_groups(ordered: NDArray[np.floating]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """First and last row of the run of equal values that each entry of ``[N, k]`` sorted columns belongs to."""
    rows = np.arange(len(ordered))[:, None]
    new = np.ones(ordered.shape, dtype=bool)  # a run starts here
    new[1:] = ordered[1:] != ordered[:-1]
    first = np.maximum.accumulate(np.where(new, rows, 0), axis=0)
    ends = np.ones(ordered.shape, dtype=bool)
    ends[:-1] = new[1:]
    last = np.minimum.accumulate(np.where(ends, rows, len(ordered) - 1)[::-1], axis=0)[::-1]
    return first, last


def _by_chunks(
    function: Callable[[NDArray[np.floating], NDArray[np.bool_]], NDArray[np.float64]],
    scores: NDArray[np.floating],
    targets: NDArray[np.bool_],
) -> NDArray[np.float64]:
    chunks = [slice(start, start + _CLASSES_AT_ONCE) for start in range(0, scores.shape[1], _CLASSES_AT_ONCE)]
    return np.concatenate([function(scores[:, chunk], targets[:, chunk]) for chunk in chunks])


def _mean(values: NDArray[np.float64]) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan


def _dprime(auc: float) -> float:
    if math.isnan(auc):
        return math.nan
    if auc in (0.0, 1.0):
        return math.copysign(math.inf, auc - 0.5)
    return math.sqrt(2) * NormalDist().inv_cdf(auc)


def _array(x: Any) -> NDArray[np.float64]:
    """float64 array from a tensor of any device and type, or from anything array-like."""
    if hasattr(x, "detach"):
        x = x.detach().double().cpu().numpy()
    return np.asarray(x, dtype=np.float64)
