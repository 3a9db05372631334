"""Pruning that knows nothing of the patches: the floor that any selection must be compared with."""

import torch

from pruneattn import ops
from pruneattn.models.scores import InputPruning


class RandomDrop(InputPruning):
    """Keeps patches drawn anew in every call: the cost of TopK and gathering, with a score for nothing."""

    def __init__(self):
        super().__init__(statistic=None)

    def __call__(self, attn, x, y, keep, extra, values):
        scores = torch.rand(x.shape[0], x.shape[1] - extra, device=x.device)
        return super().__call__(attn, x, y, keep, extra, scores)


class StrideDrop(InputPruning):
    """Keeps patches at even distances: not even a selection, only gathering."""

    def __init__(self):
        super().__init__(statistic=None)

    def __call__(self, attn, x, y, keep, extra, values):
        patches = x.shape[1] - extra
        index = (torch.arange(keep, device=x.device) * patches // keep).expand(x.shape[0], -1)  # [B, keep]
        x, rows = ops.gather_tokens(x, index, extra), ops.gather_tokens(y, index, extra)
        k, v = attn.project(y, "kv")
        (q,) = attn.project(rows, "q")
        return index, y.new_zeros(y.shape[0], patches, dtype=torch.float32), x, attn.attend(q, k, v)


DROPS = {"random drop": RandomDrop(), "stride drop": StrideDrop()}
