"""Multiply-accumulates of a pruned model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from ..constants import PATCH
from .blocks import MLP_RATIO, kept_patches, spread_keep_rate
from .vit import own_model


class Macs(NamedTuple):
    """Multiply-accumulates of one clip.

    Attributes:
        paper: the paper's count (Table II): patch embedding and blocks, where a pruning block runs its whole attention
            part on all its tokens.
        computed: count of the matrix products that this package runs, including the head.
        blocks: the pair ``(paper, computed)`` of each block.
    """

    paper: int
    computed: int
    blocks: list[tuple[int, int]]


def block_macs(tokens: int, left: int, dim: int) -> int:
    """Multiply-accumulates of a block on one clip by the paper's count.

    Args:
        tokens: tokens that enter the block; attention runs on all of them.
        left: tokens that remain for the MLP.
        dim: channels.
    """
    return 4 * tokens * dim**2 + 2 * tokens**2 * dim + 2 * MLP_RATIO * left * dim**2


def count_macs(model: nn.Module, keep_rate: float | Sequence[float] | None = None) -> Macs:
    """Count the multiply-accumulates of one clip. The model is not changed.

    The count covers matrix products only: no norms, activations, softmax or selection, and no work of a custom score
    function.

    Args:
        model: model of :func:`pruneattn.create_model`.
        keep_rate: keep-rate to count at: one number, or one per pruning block. None: the model's current keep-rates.

    Returns:
        A :class:`Macs`.

    Raises:
        UserError: not a model of this package, or not a valid keep-rate.
    """
    model = own_model(model, "count_macs")
    dim, extra, patches = model.embed_dim, model.num_extra_tokens, model.num_patches
    rates = model.keep_rates if keep_rate is None else spread_keep_rate(keep_rate, len(model.prune_blocks))
    keep_rates = dict(zip(model.prune_blocks, rates, strict=True))
    blocks = []
    left = patches
    for i in range(len(model.blocks)):
        entered, left = left, kept_patches(left, keep_rates.get(i, 1.0))
        attention = block_macs(entered + extra, 0, dim)
        computed = model.pruning.attention_macs(entered + extra, left + extra, dim) if left < entered else attention
        mlp = block_macs(0, left + extra, dim)
        blocks.append((attention + mlp, computed + mlp))
    embedding = patches * PATCH**2 * dim
    paper, computed = (sum(column) for column in zip(*blocks, strict=True))
    return Macs(embedding + paper, embedding + computed + dim * model.num_classes, blocks)
