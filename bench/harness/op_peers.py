"""Alternatives to ops in plain PyTorch that several benchmarks share."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F


def softmax_matrix(q: torch.Tensor, k: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Softmax of the scaled logits ``[B, H, Nq, Nk]``, in the dtype of the inputs or in `dtype`."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1, dtype=dtype)


def column_mean(weights: torch.Tensor, extra_tokens: int) -> torch.Tensor:
    """Mean of a softmax matrix over heads and patch queries: scores float32 ``[B, P]``."""
    return weights.mean(1)[:, extra_tokens:, extra_tokens:].mean(1).float()


def attention_without_score(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_tokens: int) -> torch.Tensor:
    """A lower bound: fused attention, which does not compute a score."""
    return F.scaled_dot_product_attention(q, k, v)


def eager_attention_with_score(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Published implementations: the whole softmax matrix, in the dtype of the inputs."""
    weights = softmax_matrix(q, k)
    return weights @ v, column_mean(weights, extra_tokens)


def attention_with_separate_score(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fused attention, then the softmax matrix for the score only."""
    weights = softmax_matrix(q, k)
    return F.scaled_dot_product_attention(q, k, v), column_mean(weights, extra_tokens)


#: Alternatives to ``column_mean_attention``, by the names in the result files.
SCORED_ATTENTION: dict[str, Callable] = {
    "SDPA, no score": attention_without_score,
    "eager": eager_attention_with_score,
    "SDPA, separate score": attention_with_separate_score,
}


def eager_cls_scores(q_cls: torch.Tensor, k: torch.Tensor, extra_tokens: int) -> torch.Tensor:
    """Scores of the class token's query, in the dtype of the inputs until the mean over heads."""
    logits = (q_cls.unsqueeze(2) @ k.transpose(-2, -1)).squeeze(2) * k.shape[-1] ** -0.5
    return logits.softmax(-1)[:, :, extra_tokens:].mean(1).float()


def topk_and_gathers(
    scores: torch.Tensor, x: torch.Tensor, y: torch.Tensor, keep: int, extra_tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ascending numbers of the kept patches, and the extra tokens and kept rows of two tensors ``[B, N, C]``."""
    index = scores.topk(keep, sorted=False).indices.sort(1).values
    rows = index.unsqueeze(-1).expand(-1, -1, x.shape[-1])
    x, y = (torch.cat([t[:, :extra_tokens], t[:, extra_tokens:].gather(1, rows)], 1) for t in (x, y))
    return index, x, y
