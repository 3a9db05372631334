"""Scores that rank patches, each with the cheapest order of work in a pruning block that gives the paper's answer.

Pruning follows attention, and everything else acts row by row, so a row that will be dropped need never be finished:
what a score does not read of it is not computed. The cost of each order of work stands beside it.
"""

import torch

from .. import ops
from ..errors import UserError


class Pruning:
    """Base of the scores: what a pruning block does from its norm to the rows that go on.

    For a score of your own derive from this and give an object of it as ``score``, to ``create_model`` or ``prune``. (A
    function of queries, keys and values will do where the score reads those of every patch.) ``attn`` has
    ``project(y, parts)``, which gives views ``[B, H, N, D]`` for neighbouring parts of "qkv" and for the rows of ``y``
    alone, ``attend(q, k, v)``, ``split_heads`` and ``merge_heads``.

    Attributes:
        parts: what is projected together, such as ("q", "kv"): ``optimize_for_inference`` packs the weights so.
        statistic: function of the input patches' cells, ``[.., P, 256]`` to ``[.., P]``, for a score that ranks by a
            number of the spectrogram; None for the others. (Only models of ``create_model`` look at the spectrogram.)
    """

    parts = ("qkv",)
    statistic = None

    def __call__(self, attn, x, y, keep, extra, values):
        """Score the patches, and run attention for what stays.

        Args:
            attn: the block's attention.
            x: the block's tokens ``[B, N, C]``, the first ``extra`` of which are no patches.
            y: the normalised tokens ``[B, N, C]``.
            keep: how many patches stay.
            extra: how many extra tokens there are.
            values: ``statistic`` of the patches that are left, float32 ``[B, N - extra]``; None without one.

        Returns:
            The kept patches int64 ``[B, keep]``, ascending; the scores float32 ``[B, N - extra]``; and the rows
            ``[B, extra + keep, ..]`` that stay of ``x`` and of the attention output (before the projection).
        """
        raise NotImplementedError

    def attention_macs(self, tokens, kept, dim):
        """Multiply-accumulates of the block's attention part on one clip, both products around it included.

        Args:
            tokens, kept: rows that enter and that stay, extra tokens included.
            dim: channels.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what it costs: give it attention_macs")

    @staticmethod
    def select_then_query(attn, x, y, scores, k, v, keep, extra):
        """What ``__call__`` returns, where the scores are known before any query: kept rows alone are queried."""
        index, x, y = ops.prune_tokens(scores, x, y, keep, extra)
        (q,) = attn.project(y, "q")  # [B, H, extra + keep, D]
        return index, scores, x, attn.attend(q, k, v)


class ColumnMeanPruning(Pruning):
    """The attention a patch receives, averaged over heads and patch queries (paper, eq. 2a): needs every query."""

    def __call__(self, attn, x, y, keep, extra, values):
        q, k, v = attn.project(y, "qkv")
        scores, index, x, out = ops.pruned_attention(q, k, v, x, keep, extra)
        return index, scores, x, out

    def attention_macs(self, tokens, kept, dim):
        return 3 * tokens * dim**2 + 2 * tokens**2 * dim + kept * dim**2


class ClsPruning(Pruning):
    """The CLS query's attention to each patch, averaged over heads (paper, eq. 2b): needs one query and every key."""

    parts = ("q", "kv")

    def __call__(self, attn, x, y, keep, extra, values):
        k, v = attn.project(y, "kv")
        (q_cls,) = attn.project(y[:, :1], "q")  # [B, H, 1, D]
        scores, index, x, y = ops.cls_prune_tokens(q_cls.squeeze(2), k, x, y, keep, extra)
        (q,) = attn.project(y, "q")  # [B, H, extra + keep, D]
        return index, scores, x, attn.attend(q, k, v)

    def attention_macs(self, tokens, kept, dim):
        scoring = dim**2 + tokens * dim
        return scoring + 2 * tokens * dim**2 + 2 * kept * dim**2 + 2 * kept * tokens * dim


class InputPruning(Pruning):
    """A number of the patch taken once from the input: needs no query of a dropped patch."""

    parts = ("q", "kv")

    def __init__(self, statistic):
        self.statistic = statistic

    def __call__(self, attn, x, y, keep, extra, values):
        k, v = attn.project(y, "kv")
        return self.select_then_query(attn, x, y, values, k, v, keep, extra)

    def attention_macs(self, tokens, kept, dim):
        return 2 * tokens * dim**2 + 2 * kept * dim**2 + 2 * kept * tokens * dim


class FunctionPruning(Pruning):
    """A function ``score(q, k, v, extra_tokens)`` of all queries, keys and values; attention for kept queries only."""

    def __init__(self, function):
        self.function = function

    def __call__(self, attn, x, y, keep, extra, values):
        q, k, v = attn.project(y, "qkv")
        scores = self.function(q, k, v, extra).detach().float()
        expected = (x.shape[0], x.shape[1] - extra)
        if scores.shape != expected:
            raise ValueError(f"score: the function must return {list(expected)}, got {list(scores.shape)}")
        index, x, q = ops.prune_tokens(scores, x, attn.merge_heads(q), keep, extra)
        (q,) = attn.split_heads(q)  # [B, H, extra + keep, D]
        return index, scores, x, attn.attend(q, k, v)

    def attention_macs(self, tokens, kept, dim):
        """The function's own work is not counted."""
        return 3 * tokens * dim**2 + kept * dim**2 + 2 * kept * tokens * dim


def mean(cells):
    """Mean over the last dimension, a power of two, summed pair by pair: the same bits on every device, and patches of
    one constant (padding) tie exactly.
    """
    cells = total = cells.to(torch.promote_types(cells.dtype, torch.float32))
    while total.shape[-1] > 1:
        total = total[..., ::2] + total[..., 1::2]
    return total.squeeze(-1) / cells.shape[-1]


def standard_deviation(cells):
    """Population standard deviation over the last dimension; exactly 0 for a constant."""
    cells = cells.to(torch.promote_types(cells.dtype, torch.float32))
    return mean((cells - mean(cells).unsqueeze(-1)).square()).sqrt()


def random_numbers(cells):
    """Uniform numbers in [0, 1), one per patch ``[.., P, 256]`` to ``[.., P]``: the ranking that knows nothing.

    Hashed from the clip's float32 bits and the patch number, so that a clip keeps the same patches in every run,
    whatever batch it is in, and any change of the input (gain, noise, mixup in training) draws anew.
    """
    bits = cells.float().contiguous().view(torch.int32).long()  # [.., P, 256]
    clip = bits.sum((-2, -1)).unsqueeze(-1)  # [.., 1]: whole numbers, the same in any order
    patch = torch.arange(cells.shape[-2], device=cells.device)
    return (_mix(_mix(clip) + patch) >> 8).float() / 2**24


def _mix(x):
    """The finaliser of MurmurHash3 on the low 32 bits of int64."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


_PRUNINGS = {
    "column_mean": ColumnMeanPruning(),
    "cls": ClsPruning(),
    "intensity": InputPruning(mean),
    "variation": InputPruning(standard_deviation),
    "random": InputPruning(random_numbers),
}
#: Names of the scores, for command lines.
SCORES = tuple(_PRUNINGS)
#: Those that read the blocks alone, so that they rank the patches of other people's models, too.
ADAPTED_SCORES = tuple(name for name, pruning in _PRUNINGS.items() if pruning.statistic is None)


def make_pruning(score):
    """The pruning for a score: a name in ``SCORES``, a function, or a :class:`Pruning`."""
    if isinstance(score, Pruning):
        return score
    if callable(score):
        return FunctionPruning(score)
    if score not in _PRUNINGS:
        raise UserError(f"score: expected a function, a Pruning or one of {', '.join(_PRUNINGS)}, got {score!r}")
    return _PRUNINGS[score]
