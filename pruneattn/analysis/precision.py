"""Accuracy of a checkpoint in each precision of ``optimize_for_inference``, and the patches that it keeps."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..models.trace import Trace, trace
from ..models.vit import PrunedViT
from ..report import Row
from ..runtime.inference import INT8, optimized
from .clips import Analysis, iterate_clips
from .paired import metric_name, paired_test, unit_scores

#: Precisions by their names in ``--amp``. The others are compared with the first.
PRECISIONS = ("fp32", "bf16", INT8)


def measure_precision(
    analysis: Analysis, keep_rates: Sequence[Any], calibrate: Sequence[torch.Tensor] | None = None
) -> tuple[list[Row], PrunedViT]:
    """Compare bfloat16 and 8-bit weights with float32, on the same clips.

    The logits of all clips stay in memory.

    Args:
        analysis: model and dataset; the device must be a CPU.
        keep_rates: each a number in (0, 1], or a tuple with one per pruning block.
        calibrate: batches of spectrograms ``[B, frames, 128]`` that choose the layers with 8-bit weights.

    Returns:
        One dict per keep-rate and precision: ``metric``, its ``difference`` from float32 with standard error and
        p-value (paired t-test over clips, over classes for mAP), ``logits_error`` (norm of the difference of the
        logits, relative to those of float32), ``same_patches`` (fraction of the patches that the last pruning block
        keeps in float32 and that are kept in this precision, too) and ``clips``. And the model with 8-bit weights.
    """
    models = {
        name: optimized(copy.deepcopy(analysis.model), analysis.device, name, calibrate)[0] for name in PRECISIONS
    }
    multilabel = bool(analysis.model.multilabel)
    targets: list[torch.Tensor] = []
    logits: dict[tuple[Any, str], list[torch.Tensor]] = {}
    same: dict[tuple[Any, str], list[float]] = {}
    for batch in iterate_clips(analysis, "precision"):
        targets.append(batch.targets)
        for keep_rate in keep_rates:
            found = {name: _trace(model, batch.fbank, keep_rate) for name, model in models.items()}
            for name, one in found.items():
                logits.setdefault((keep_rate, name), []).append(one.logits.float())
                same.setdefault((keep_rate, name), []).extend(_same_patches(found[PRECISIONS[0]], one))
    all_targets = torch.cat(targets).numpy()
    joined = {cell: torch.cat(parts).numpy() for cell, parts in logits.items()}
    rows = []
    for (keep_rate, name), values in joined.items():
        expected = joined[keep_rate, PRECISIONS[0]]
        units, reference = (unit_scores(one, all_targets, multilabel) for one in (values, expected))
        rows.append(
            {
                "keep_rate": keep_rate,
                "precision": name,
                "metric_name": metric_name(multilabel),
                "metric": float(np.nanmean(units)),
                **paired_test(units - reference),
                "logits_error": float(np.linalg.norm(values - expected) / np.linalg.norm(expected)),
                "same_patches": float(np.mean(same[keep_rate, name])),
                "clips": len(values),
            }
        )
    return rows, models[INT8]


@torch.inference_mode()
def _trace(model: PrunedViT, fbank: torch.Tensor, keep_rate: Any) -> Trace:
    model.set_keep_rate(keep_rate)
    return trace(model, fbank)


def _same_patches(first: Trace, second: Trace) -> list[float]:
    """Per clip, the fraction of the patches that ``first`` keeps to the end and that ``second`` keeps, too."""
    if not first.kept:
        return [1.0] * len(first.logits)
    return [float(torch.isin(a, b).float().mean()) for a, b in zip(first.kept[-1], second.kept[-1], strict=True)]
