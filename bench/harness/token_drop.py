"""Pruning without a score: a lower bound on the time of any selection."""

from __future__ import annotations

from typing import Any

import torch

from pruneattn import ops
from pruneattn.models.scores import InputPruning


class RandomDrop(InputPruning):
    """Keep random patches, drawn in every call. The cost is that of TopK and gather, without a score."""

    def __init__(self) -> None:
        super().__init__(statistic=None)

    def __call__(self, attn: Any, x: torch.Tensor, y: torch.Tensor, keep: int, extra: int, values: Any) -> Any:
        scores = torch.rand(x.shape[0], x.shape[1] - extra, device=x.device)
        return super().__call__(attn, x, y, keep, extra, scores)


class StrideDrop(InputPruning):
    """Keep patches at regular intervals. The cost is that of gather only."""

    def __init__(self) -> None:
        super().__init__(statistic=None)

    def __call__(self, attn: Any, x: torch.Tensor, y: torch.Tensor, keep: int, extra: int, values: Any) -> Any:
        patches = x.shape[1] - extra
        index = (torch.arange(keep, device=x.device) * patches // keep).expand(x.shape[0], -1)  # [B, keep]
        x, rows = ops.gather_tokens(x, index, extra), ops.gather_tokens(y, index, extra)
        k, v = attn.project(y, "kv")
        (q,) = attn.project(rows, "q")
        return index, y.new_zeros(y.shape[0], patches, dtype=torch.float32), x, attn.attend(q, k, v)


DROPS = {"random drop": RandomDrop(), "stride drop": StrideDrop()}
