"""Numbers that say how good predictions are: mAP, mAUC, d', top-1, top-5, and the same per class."""

import math
from statistics import NormalDist

import numpy as np

from .errors import UserError

# Classes ranked at once: bounds the working memory at some tens of bytes per clip and class of the chunk.
_CLASSES_AT_ONCE = 64


def evaluate_predictions(logits, targets, multilabel):
    """Score the predictions of a whole set.

    Args:
        logits: ``[N, K]`` tensor or array, any float type: the model's raw outputs.
        targets: ``[N, K]`` tensor or array; a label is there where its value is above 0.5 (one-hot for one a clip).
        multilabel: whether a clip may have several labels. If so classes are scored by themselves (sigmoid), else
            against one another (softmax), which decides what "a high score" means across clips.

    Returns:
        dict of floats in 0..1 (``dprime`` is unbounded):
        ``map``: macro mean of average precision over the classes that have a positive clip;
        ``mauc``: macro mean of the area under the ROC curve over the classes with positive and negative clips;
        ``dprime``: ``sqrt(2) * ndtri(mauc)`` as AST (Gong et al. 2021) and AudioSet's baselines define it;
        ``top1``, ``top5``: share of clips with a right label among the 1 or ``min(5, K)`` highest scores, ties going to
        the lower class number;
        ``per_class``: one dict per class with ``label`` (its number), ``positives``, ``ap``, ``auc``, ``precision`` and
        ``recall`` (of "highest score" decisions, or of "probability above 0.5" if multilabel). What is undefined for
        want of clips is NaN.

    Raises:
        UserError: there are no clips, or outputs that are not finite.
        ValueError: the shapes do not fit.
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
            "or its range is too large for fp16 (try bf16 or fp32)"
        )
    # Log-probabilities rank as probabilities do, without their saturation at 0 and 1, which would invent ties.
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


def average_precision(scores, targets):
    """Average precision of every class: ``[N, K]`` scores and booleans -> float64 ``[K]``.

    ``sum_n (R_n - R_{n-1}) P_n`` over the distinct scores, so clips with the same score count together, as in
    scikit-learn. NaN for a class without positives.
    """

    def chunk(scores, targets):
        order = np.argsort(-scores, axis=0, kind="stable")
        _, last = _tie_groups(np.take_along_axis(scores, order, axis=0))
        hit = np.take_along_axis(targets, order, axis=0)
        found = np.take_along_axis(hit.cumsum(axis=0), last, axis=0)
        with np.errstate(invalid="ignore"):
            return (hit * found / (last + 1)).sum(axis=0) / hit.sum(axis=0)

    return _by_chunks(chunk, scores, targets)


def roc_auc(scores, targets):
    """Area under the ROC curve of every class: ``[N, K]`` scores and booleans -> float64 ``[K]``.

    The chance that a positive clip outranks a negative one, a tie counting half (Mann-Whitney from mean ranks). NaN for
    a class without positives or without negatives.
    """

    def chunk(scores, targets):
        order = np.argsort(scores, axis=0, kind="stable")
        first, last = _tie_groups(np.take_along_axis(scores, order, axis=0))
        hit = np.take_along_axis(targets, order, axis=0)
        positives = hit.sum(axis=0)
        ranks = (hit * ((first + last) / 2 + 1)).sum(axis=0)
        with np.errstate(invalid="ignore"):
            return (ranks - positives * (positives + 1) / 2) / (positives * (len(scores) - positives))

    return _by_chunks(chunk, scores, targets)


def _tie_groups(ordered):
    """Row numbers at which each entry's run of equal values starts and ends, per column of ``[N, k]`` sorted scores."""
    rows = np.arange(len(ordered))[:, None]
    new = np.ones(ordered.shape, dtype=bool)  # a run starts here
    new[1:] = ordered[1:] != ordered[:-1]
    first = np.maximum.accumulate(np.where(new, rows, 0), axis=0)
    ends = np.ones(ordered.shape, dtype=bool)
    ends[:-1] = new[1:]
    last = np.minimum.accumulate(np.where(ends, rows, len(ordered) - 1)[::-1], axis=0)[::-1]
    return first, last


def _by_chunks(function, scores, targets):
    chunks = [slice(start, start + _CLASSES_AT_ONCE) for start in range(0, scores.shape[1], _CLASSES_AT_ONCE)]
    return np.concatenate([function(scores[:, chunk], targets[:, chunk]) for chunk in chunks])


def _mean(values):
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan


def _dprime(auc):
    if math.isnan(auc):
        return math.nan
    if auc in (0.0, 1.0):
        return math.copysign(math.inf, auc - 0.5)
    return math.sqrt(2) * NormalDist().inv_cdf(auc)


def _array(x):
    """float64 array of a tensor of any device and type, or of anything array-like."""
    if hasattr(x, "detach"):
        x = x.detach().double().cpu().numpy()
    return np.asarray(x, dtype=np.float64)
