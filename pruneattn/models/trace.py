"""Which patches a pruned model keeps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .vit import own_model


class Trace(NamedTuple):
    """Logits of a batch, and the selection of each pruning block.

    Attributes:
        logits: ``[B, num_classes]``.
        kept: per pruning block int64 ``[B, k_i]``: numbers of the input patches that it kept, ascending, in the model's
            token order (``model.patch_position`` converts them to positions).
        scores: per pruning block float32 ``[B, n_i]``: score of each patch that entered the block, in the order of the
            previous block's ``kept``.
    """

    logits: Tensor
    kept: list[Tensor]
    scores: list[Tensor]


def trace(model: nn.Module, fbank: Tensor, patches: Tensor | None = None) -> Trace:
    """Run a pruned model, and record the scores and the kept patches of each pruning block.

    Blocks with a keep-rate of 1 are scored too. Gradients and stochastic depth work as in a plain forward pass: put the
    model in ``eval()`` mode for reproducible results.

    Args:
        model: model of :func:`pruneattn.create_model`.
        fbank: normalized log-mel spectrograms ``[B, frames, 128]``.
        patches: int64 ``[B, P']``: numbers of the patches to start with, ascending. None: all patches.

    Returns:
        A :class:`~pruneattn.models.trace.Trace`.

    Raises:
        UserError: not a model of this package.
    """
    model = own_model(model, "trace")
    record: list[tuple[Tensor, Tensor]] = []
    logits = model.forward_head(model.forward_features(fbank, patches, record))
    numbers = patches
    if numbers is None:
        numbers = torch.arange(model.num_patches, device=fbank.device).expand(fbank.shape[0], -1)  # [B, P]
    kept = []
    for index, _ in record:
        numbers = numbers.gather(1, index)  # [B, k_i]
        kept.append(numbers)
    return Trace(logits, kept, [scores.float() for _, scores in record])
