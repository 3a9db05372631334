"""Scores that rank patches, each with the cheapest order of computation whose result matches the paper's method.

Pruning follows attention, and everything else acts row by row, so dropped rows need not be completed: a row's queries,
output and projection are computed only if the score reads them or the row is kept. ``attention_macs`` of each class
gives the cost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from .. import ops
from ..errors import UserError
from .heads import MultiHead

#: What a pruning returns: kept patches, scores, and the kept rows of the tokens and of the attention output.
Pruned: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]


class Pruning:
    """Base class of the scores: the part of a pruning block from its first norm to the kept rows.

    For a custom score, derive from this class and pass an instance as ``score`` to ``create_model`` or ``prune``. (A
    function of queries, keys and values is enough if the score reads them for every patch.) The argument ``attn`` has
    the methods ``project(y, parts)``, which returns views ``[B, H, N, D]`` of neighboring parts of "qkv" for the rows
    of ``y`` only, ``attend(q, k, v)``, ``split_heads`` and ``merge_heads``.

    Attributes:
        parts: parts that are projected together, for example ("q", "kv"). ``optimize_for_inference`` packs the weights
            in these groups.
        statistic: for a score that ranks by a number of the spectrogram: function of the cells of the input patches,
            ``[.., P, 256]`` to ``[.., P]``. None for all other scores. Only models of ``create_model`` support it.
    """

    parts: tuple[str, ...] = ("qkv",)
    statistic: Callable[[Tensor], Tensor] | None = None

    def __call__(self, attn: MultiHead, x: Tensor, y: Tensor, keep: int, extra: int, values: Tensor | None) -> Pruned:
        """Score the patches, and run attention for the kept rows.

        Args:
            attn: the block's attention.
            x: the block's tokens ``[B, N, C]``, of which the first ``extra`` are not patches.
            y: the normalized tokens ``[B, N, C]``.
            keep: number of patches to keep.
            extra: number of extra tokens.
            values: ``statistic`` of the remaining patches, float32 ``[B, N - extra]``; None without a statistic.

        Returns:
            The kept patches int64 ``[B, keep]``, ascending; the scores float32 ``[B, N - extra]``; and the kept rows
            ``[B, extra + keep, ..]`` of ``x`` and of the attention output before the projection.
        """
        raise NotImplementedError

    def attention_macs(self, tokens: int, kept: int, dim: int) -> int:
        """Multiply-accumulates of the block's attention part on one clip, including both projections.

        Args:
            tokens, kept: rows that enter and rows that are kept, including extra tokens.
            dim: channels.
        """
        raise NotImplementedError(f"{type(self).__name__} does not give its cost: implement attention_macs")

    @staticmethod
    def select_then_query(
        attn: MultiHead, x: Tensor, y: Tensor, scores: Tensor, k: Tensor, v: Tensor, keep: int, extra: int
    ) -> Pruned:
        """The result of ``__call__`` where no query is needed for the scores: only kept rows are queried."""
        index, x, y = ops.prune_tokens(scores, x, y, keep, extra)
        (q,) = attn.project(y, "q")  # [B, H, extra + keep, D]
        return index, scores, x, attn.attend(q, k, v)


#: A score: a name in ``SCORES``, a function ``score(q, k, v, extra_tokens)``, or a :class:`Pruning`.
Score: TypeAlias = str | Callable[[Tensor, Tensor, Tensor, int], Tensor] | Pruning


class ColumnMeanPruning(Pruning):
    """The attention that a patch receives, averaged over heads and patch queries (paper, eq. 2a): needs all queries."""

    def __call__(self, attn: MultiHead, x: Tensor, y: Tensor, keep: int, extra: int, values: Tensor | None) -> Pruned:
        q, k, v = attn.project(y, "qkv")
        scores, index, x, out = ops.pruned_attention(q, k, v, x, keep, extra)
        return index, scores, x, out

    def attention_macs(self, tokens: int, kept: int, dim: int) -> int:
        return 3 * tokens * dim**2 + 2 * tokens**2 * dim + kept * dim**2


class ClsPruning(Pruning):
    """The CLS query's attention to each patch, averaged over heads (paper, eq. 2b): needs one query and all keys."""

    parts = ("q", "kv")

    def __call__(self, attn: MultiHead, x: Tensor, y: Tensor, keep: int, extra: int, values: Tensor | None) -> Pruned:
        k, v = attn.project(y, "kv")
        (q_cls,) = attn.project(y[:, :1], "q")  # [B, H, 1, D]
        scores, index, x, y = ops.cls_prune_tokens(q_cls.squeeze(2), k, x, y, keep, extra)
        (q,) = attn.project(y, "q")  # [B, H, extra + keep, D]
        return index, scores, x, attn.attend(q, k, v)

    def attention_macs(self, tokens: int, kept: int, dim: int) -> int:
        scoring = dim**2 + tokens * dim
        return scoring + 2 * tokens * dim**2 + 2 * kept * dim**2 + 2 * kept * tokens * dim


class InputPruning(Pruning):
    """A statistic of the patch in the input, computed once: needs no query of a dropped patch."""

    parts = ("q", "kv")

    def __init__(self, statistic: Callable[[Tensor], Tensor]) -> None:
        self.statistic = statistic

    def __call__(self, attn: MultiHead, x: Tensor, y: Tensor, keep: int, extra: int, values: Tensor | None) -> Pruned:
        assert values is not None  # the model computes them, because there is a statistic
        k, v = attn.project(y, "kv")
        return self.select_then_query(attn, x, y, values, k, v, keep, extra)

    def attention_macs(self, tokens: int, kept: int, dim: int) -> int:
        return 2 * tokens * dim**2 + 2 * kept * dim**2 + 2 * kept * tokens * dim


class FunctionPruning(Pruning):
    """A function ``score(q, k, v, extra_tokens)`` of all queries, keys and values; attention of the kept rows only."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor, int], Tensor]) -> None:
        self.function = function

    def __call__(self, attn: MultiHead, x: Tensor, y: Tensor, keep: int, extra: int, values: Tensor | None) -> Pruned:
        q, k, v = attn.project(y, "qkv")
        scores = self.function(q, k, v, extra).detach().float()
        expected = (x.shape[0], x.shape[1] - extra)
        if scores.shape != expected:
            raise ValueError(f"score: the function must return {list(expected)}, got {list(scores.shape)}")
        index, x, q = ops.prune_tokens(scores, x, attn.merge_heads(q), keep, extra)
        (q,) = attn.split_heads(q)  # [B, H, extra + keep, D]
        return index, scores, x, attn.attend(q, k, v)

    def attention_macs(self, tokens: int, kept: int, dim: int) -> int:
        """See the base class. The work of the function itself is not counted."""
        return 3 * tokens * dim**2 + kept * dim**2 + 2 * kept * tokens * dim


def mean(cells: Tensor) -> Tensor:
    """Mean over the last dimension, whose size must be a power of two.

    The sum is pairwise, in a fixed order: results are bitwise equal on all devices, and patches of one constant
    (padding) tie exactly.
    """
    cells = total = cells.to(torch.promote_types(cells.dtype, torch.float32))
    while total.shape[-1] > 1:
        total = total[..., ::2] + total[..., 1::2]
    return total.squeeze(-1) / cells.shape[-1]


def standard_deviation(cells: Tensor) -> Tensor:
    """Population standard deviation over the last dimension; exactly 0 for a constant."""
    cells = cells.to(torch.promote_types(cells.dtype, torch.float32))
    return mean((cells - mean(cells).unsqueeze(-1)).square()).sqrt()


def random_numbers(cells: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), one per patch, ``[.., P, 256]`` to ``[.., P]``: a random ranking.

    The numbers are a hash of the clip's float32 bits and the patch number. A clip keeps the same patches in every run
    and in every batch, and any change of the input (gain, noise, mixup in training) draws new numbers.
    """
    bits = cells.float().contiguous().view(torch.int32).long()  # [.., P, 256]
    clip = bits.sum((-2, -1)).unsqueeze(-1)  # [.., 1]: whole numbers, the same in any order
    patch = torch.arange(cells.shape[-2], device=cells.device)
    return (_mix(_mix(clip) + patch) >> 8).float() / 2**24


def _mix(x: Tensor) -> Tensor:
    """The finalizer of MurmurHash3 on the low 32 bits of int64."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


_PRUNINGS: dict[str, Pruning] = {
    "column_mean": ColumnMeanPruning(),
    "cls": ClsPruning(),
    "intensity": InputPruning(mean),
    "variation": InputPruning(standard_deviation),
    "random": InputPruning(random_numbers),
}
#: Names of the scores, for command lines.
SCORES = tuple(_PRUNINGS)
#: Names of the scores that read the blocks only, and therefore also work for models changed by ``prune``.
ADAPTED_SCORES = tuple(name for name, pruning in _PRUNINGS.items() if pruning.statistic is None)


def make_pruning(score: Score) -> Pruning:
    """The :class:`Pruning` of a score.

    Raises:
        UserError: there is no score of this name.
    """
    if isinstance(score, Pruning):
        return score
    if callable(score):
        return FunctionPruning(score)
    if score not in _PRUNINGS:
        raise UserError(f"score: expected a function, a Pruning or one of {', '.join(_PRUNINGS)}, got {score!r}")
    return _PRUNINGS[score]
