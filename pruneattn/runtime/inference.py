"""Logits of a whole data set: what validation during training and `python -m pruneattn.evaluate` share."""

from contextlib import nullcontext
from typing import NamedTuple

import torch

from ..errors import UserError
from ..models.optimize import optimize_for_inference
from . import distributed

AMP_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Predictions(NamedTuple):
    """The clips of a data set that could be decoded, in the order of the data set, on the CPU."""

    logits: torch.Tensor  # float32 [N, K]
    targets: torch.Tensor  # float32 [N, K]
    index: torch.Tensor  # int64 [N], each clip's number in the data set
    failed: list  # (path, message) of the clips that could not be decoded


def autocast(device, amp):
    """Context in which a model runs in ``amp`` ("fp32", "bf16" or "fp16") on ``device``."""
    dtype = AMP_DTYPES[amp]
    return nullcontext() if dtype is None else torch.autocast(torch.device(device).type, dtype)


def can_optimize(device, amp):
    """Whether ``optimize_for_inference`` has something to do for this device and precision."""
    return torch.device(device).type == "cpu" and amp != "fp16"


def optimized(model, device, amp):
    """The model on ``device`` as it runs fastest there, and the ``amp`` that is left to do around it.

    On a CPU that is ``optimize_for_inference``, which changes the model in place, in the precision of ``amp``.
    """
    model = model.to(device)
    if not can_optimize(device, amp):
        return model, amp
    return optimize_for_inference(model, AMP_DTYPES[amp] or torch.float32), "fp32"


@torch.inference_mode()
def predict_dataset(model, features, loader, device, amp="fp32"):
    """Run ``model`` over an evaluation loader.

    With several processes (``torch.distributed`` is initialised) each brings its own part of the data set, as
    ``make_loader(train=False, rank=..., world=...)`` gives it, and every one gets the whole result: each clip once,
    whatever the count.

    Args:
        model: Gives logits ``[B, K]`` for ``[B, frames, 128]``; used in eval mode and left in the mode it was in.
        features: ``FeatureExtractor`` on ``device``.
        loader: Iterable of ``Batch``.
        device: Where to compute.
        amp: "fp32", "bf16" or "fp16": precision of the model; features are float32.

    Returns:
        `Predictions`.

    Raises:
        UserError: not one clip could be decoded.
    """
    was_training = model.training
    model.eval()
    logits, targets, index, failed = [], [], [], []
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
    part = None
    if index:
        part = torch.cat(logits).cpu(), torch.cat(targets), torch.cat(index)
    parts = distributed.gather_objects((part, failed))
    failed = sorted({tuple(clip) for _, clips in parts for clip in clips})
    parts = [part for part, _ in parts if part is not None]
    if not parts:
        reason = f"; the first, {failed[0][0]}: {failed[0][1]}" if failed else ""
        raise UserError(f"not one clip of the data set could be decoded{reason}")
    logits, targets, index = (torch.cat(column) for column in zip(*parts))
    order = index.argsort()
    return Predictions(logits[order], targets[order], index[order], failed)


def evaluate_model(model, features, loader, device, amp="fp32", *, multilabel):
    """Metrics of `metrics.evaluate_predictions` over an evaluation loader, and the clips that could not be decoded."""
    from ..metrics import evaluate_predictions

    predictions = predict_dataset(model, features, loader, device, amp)
    return evaluate_predictions(predictions.logits, predictions.targets, multilabel), predictions.failed
