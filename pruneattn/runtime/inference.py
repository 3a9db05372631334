"""Logits and metrics of a model on a whole dataset, for validation during training and for ``pruneattn evaluate``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from ..data.loader import Batch
from ..errors import UserError
from ..metrics import evaluate_predictions
from ..models.optimize import optimize_for_inference
from ..models.vit import PrunedViT
from . import distributed

#: Precision of a model by its name in ``--amp``; None means no autocast.
AMP_DTYPES: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Name in ``--amp`` of 8-bit weights, on a CPU only.
INT8 = "int8"


class Predictions(NamedTuple):
    """Predictions for the clips of a dataset that could be decoded, in the order of the dataset, on the CPU."""

    logits: torch.Tensor  # float32 [N, K]
    targets: torch.Tensor  # float32 [N, K]
    # int64 [N], each clip's number in the dataset. The name is public, and hides the method of tuple.
    index: torch.Tensor  # type: ignore[assignment]
    failed: list[tuple[str, str]]  # (path, message) of the clips that could not be decoded


def autocast(device: torch.device | str, amp: str) -> AbstractContextManager:
    """Context in which a model runs in the precision ``amp`` ("fp32", "bf16" or "fp16") on ``device``.

    "int8" changes nothing: only `optimized` gives a model 8-bit weights.
    """
    dtype = None if amp == INT8 else AMP_DTYPES[amp]
    return nullcontext() if dtype is None else torch.autocast(torch.device(device).type, dtype)


def can_optimize(device: torch.device | str, amp: str) -> bool:
    """Whether ``optimize_for_inference`` supports this device and precision.

    Raises:
        UserError: 8-bit weights on another device than a CPU.
    """
    cpu = torch.device(device).type == "cpu"
    if amp == INT8 and not cpu:
        raise UserError(
            f"amp (--amp) int8: 8-bit weights need a CPU, but the device is {device}: use bf16 or fp16 there"
        )
    return cpu and amp != "fp16"


def optimized(
    model: PrunedViT, device: torch.device | str, amp: str, calibrate: Iterable[torch.Tensor] | None = None
) -> tuple[PrunedViT, str]:
    """Move a model to a device, in the form that runs fastest there.

    On a CPU, ``optimize_for_inference`` changes the model in place and converts it to the precision of ``amp``.

    Args:
        model: the model. One with 8-bit weights, as ``load_pretrained`` may give, supports "int8" only.
        device: the device.
        amp: "fp32", "bf16", "fp16" or "int8".
        calibrate: batches of spectrograms for 8-bit weights, float32 ``[B, frames, 128]``.

    Returns:
        The model, and the ``amp`` in which to call it ("fp32" if the model itself has the precision).
    """
    if model.quantization is not None and amp != INT8:
        raise UserError(f"amp (--amp) {amp}: the checkpoint has 8-bit weights, which run with int8 only")
    if not can_optimize(device, amp):
        return model.to(device), amp
    if not model.optimized:
        model = model.to(device)
    dtype = torch.int8 if amp == INT8 else AMP_DTYPES[amp] or torch.float32
    return optimize_for_inference(model, dtype, calibrate), "fp32"


@torch.inference_mode()
def predict_dataset(
    model: nn.Module,
    features: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    loader: Iterable[Batch],
    device: torch.device | str,
    amp: str = "fp32",
) -> Predictions:
    """Run a model over an evaluation loader.

    If ``torch.distributed`` is initialized, each process runs its own part of the dataset, from
    ``make_loader(train=False, rank=..., world=...)``, and every process gets the whole result. Each clip appears once,
    for any number of processes.

    Args:
        model: returns logits ``[B, K]`` for ``[B, frames, 128]``; runs in evaluation mode, then returns to its mode.
        features: ``FeatureExtractor`` on ``device``.
        loader: iterable of ``Batch``.
        device: where to compute.
        amp: "fp32", "bf16" or "fp16": precision of the model; features are float32.

    Returns:
        `Predictions`.

    Raises:
        UserError: no clip could be decoded.
    """
    was_training = model.training
    model.eval()
    logits, targets, index = [], [], []
    failed: list[tuple[str, str]] = []
    try:
        for batch in loader:
            failed.extend(batch.failed)
            if len(batch.index) == 0:
                continue
            fbank = features(batch.waves.to(device, non_blocking=True), batch.lengths)  # [B, frames, 128]
            with autocast(device, amp):
                logits.append(model(fbank).float())  # [B, K]
            targets.append(batch.targets)
            index.append(batch.index)
    finally:
        model.train(was_training)
    part = (torch.cat(logits).cpu(), torch.cat(targets), torch.cat(index)) if index else None
    gathered = distributed.gather_objects((part, failed))
    failed = sorted({(path, message) for _, clips in gathered for path, message in clips})
    parts = [part for part, _ in gathered if part is not None]
    if not parts:
        reason = f"; the first, {failed[0][0]}: {failed[0][1]}" if failed else ""
        raise UserError(f"no clip of the dataset could be decoded{reason}")
    all_logits, all_targets, all_index = (torch.cat(column) for column in zip(*parts, strict=True))
    order = all_index.argsort()
    return Predictions(all_logits[order], all_targets[order], all_index[order], failed)


def evaluate_model(
    model: nn.Module,
    features: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    loader: Iterable[Batch],
    device: torch.device | str,
    amp: str = "fp32",
    *,
    multilabel: bool,
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Metrics of ``metrics.evaluate_predictions`` on an evaluation loader, and the clips that could not be decoded.

    The arguments are those of `predict_dataset`; ``multilabel`` is whether a clip can have several labels.
    """
    predictions = predict_dataset(model, features, loader, device, amp)
    return evaluate_predictions(predictions.logits, predictions.targets, multilabel), predictions.failed
