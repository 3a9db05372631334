"""Multiply-accumulates of a pruned model."""

from typing import NamedTuple

from ..constants import PATCH
from .blocks import MLP_RATIO, kept_patches
from .vit import own_model


class Macs(NamedTuple):
    """Multiply-accumulates of one clip.

    Attributes:
        paper: as the paper counts (its Table II): patch embedding and blocks, where a pruning block runs the whole
            attention part on all its tokens.
        computed: of the matrix products that this package really runs, head included.
        blocks: per block the pair ``(paper, computed)``.
    """

    paper: int
    computed: int
    blocks: list


def block_macs(tokens, left, dim):
    """Multiply-accumulates of a block of ``dim`` channels on one clip, as the paper counts: attention on all tokens that
    enter, the MLP on those that are ``left``.
    """
    return 4 * tokens * dim**2 + 2 * tokens**2 * dim + 2 * MLP_RATIO * left * dim**2


def count_macs(model):
    """Count the multiply-accumulates of one clip at the model's current keep-rates, as a :class:`Macs`.

    Matrix products only: norms, activations, softmax and selection are not counted, nor is what a score function of
    one's own does.
    """
    model = own_model(model, "count_macs")
    dim, extra, patches = model.embed_dim, model.num_extra_tokens, model.num_patches
    keep_rates = dict(zip(model.prune_blocks, model.keep_rates))
    blocks = []
    left = patches
    for i in range(len(model.blocks)):
        entered, left = left, kept_patches(left, keep_rates.get(i, 1.0))
        attention = block_macs(entered + extra, 0, dim)
        computed = model.pruning.attention_macs(entered + extra, left + extra, dim) if left < entered else attention
        mlp = block_macs(0, left + extra, dim)
        blocks.append((attention + mlp, computed + mlp))
    embedding = patches * PATCH**2 * dim
    paper, computed = (sum(column) for column in zip(*blocks))
    return Macs(embedding + paper, embedding + computed + dim * model.num_classes, blocks)
