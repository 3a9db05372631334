"""Token merging after ToMe (Bolya et al., 2023), on the layers of our models, as a baseline.

Every block merges similar tokens between attention and MLP; no token is dropped. Tokens at even positions (A) are
matched with the token at an odd position (B) whose key, averaged over heads, is the most similar. The ``r`` best pairs
are replaced by their mean, weighted by *size*: the number of input tokens that a token represents. Attention adds log
size to the logits. Extra tokens are never merged. ToMe reorders the remaining tokens; here they keep their order.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from pruneattn import ops
from pruneattn.constants import PATCH
from pruneattn.models import PrunedViT
from pruneattn.models.macs import block_macs


class MergingViT(nn.Module):
    """A model of this package, optimized or not, that merges ``r`` tokens in every block instead of pruning."""

    def __init__(self, model: PrunedViT, r: int):
        super().__init__()
        self.model, self.r = model, r

    def forward(self, fbank: torch.Tensor) -> torch.Tensor:
        x, size = self.merge_features(fbank)
        if size is None or self.model.num_extra_tokens == 2:
            return self.model.forward_head(x)
        # The head's mean over patches is weighted by size.
        weights = size[:, 1:] / size[:, 1:].mean(1, keepdim=True)  # [B, P, 1]
        return self.model.forward_head(torch.cat([x[:, :1], (x[:, 1:] * weights).to(x.dtype)], 1))

    def merge_features(self, fbank: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens after the last block ``[B, N, C]`` and their sizes ``[B, N, 1]`` (None: all 1)."""
        model = self.model
        x, size = model.prepend_extra_tokens(model.embed(fbank)), None
        for block in model.blocks:
            x, size = merging_block(block, x, size, self.r, model.num_extra_tokens)
        return x, size


def merging_block(
    block: nn.Module, x: torch.Tensor, size: torch.Tensor | None, r: int, extra: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run a block of our models with merging.

    Args:
        block: the block.
        x: tokens ``[B, N, C]``.
        size: their sizes ``[B, N, 1]``; None: all 1.
        r: tokens to merge.
        extra: number of extra tokens.

    Returns:
        The new tokens and sizes.
    """
    q, k, v = block.attn.project(block.norm1(x), "qkv")
    bias = None if size is None else size.log().to(q.dtype)[:, None, None, :, 0]  # [B, 1, 1, N]
    attended = block.attn.merge_heads(F.scaled_dot_product_attention(q, k, v, bias))
    x = block.attn.proj.add(attended, x)
    r = mergeable(x.shape[1], r, extra)
    if r:
        x, size = merge(x, size, match(k.mean(1), r, extra))
    return block.mlp.fc2.add(block.mlp.fc1.gelu(block.norm2(x)), x), size


def mergeable(tokens: int, r: int, extra: int) -> int:
    """Number of tokens that can be merged, at most ``r``: patches at even positions."""
    return max(0, min(r, (tokens + 1) // 2 - (extra + 1) // 2)) if tokens - extra > 1 else 0


def match(keys: torch.Tensor, r: int, extra: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the pairs to merge by their keys ``[B, N, D]``.

    Returns:
        Positions ``[B, r]`` of the tokens that are removed, and of the tokens that they are merged into.
    """
    keys = F.normalize(keys.float(), dim=-1)
    similarity = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)  # [B, A, B']
    similarity[:, : (extra + 1) // 2] = -math.inf
    similarity[:, :, : extra // 2] = -math.inf
    best, partner = similarity.max(-1)  # [B, A]
    removed = best.topk(r).indices  # [B, r]
    return 2 * removed, 2 * partner.gather(1, removed) + 1


def merge(
    x: torch.Tensor, size: torch.Tensor | None, pairs: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge pairs of tokens. The remaining tokens keep their order.

    Args:
        x: tokens ``[B, N, C]``.
        size: their sizes ``[B, N, 1]``; None: all 1.
        pairs: the positions that `match` returns.

    Returns:
        Tokens ``[B, N - r, C]`` and sizes ``[B, N - r, 1]``.
    """
    removed, into = pairs
    batch, tokens, dim = x.shape
    size = x.new_ones(batch, tokens, 1, dtype=torch.float32) if size is None else size
    total = x * size  # float32 [B, N, C]
    total = total.scatter_add(1, into.unsqueeze(-1).expand(-1, -1, dim), ops.gather_tokens(total, removed, 0))
    size = size.scatter_add(1, into.unsqueeze(-1), size.gather(1, removed.unsqueeze(-1)))
    stays = torch.ones(batch, tokens, device=x.device).scatter(1, removed, 0.0)
    rows = ops.select_tokens(stays, tokens - removed.shape[1])  # [B, N - r]
    size = ops.gather_tokens(size, rows, 0)
    return (ops.gather_tokens(total, rows, 0) / size).to(x.dtype), size


def matching_macs(tokens: int, head_dim: int) -> int:
    """Multiply-accumulates of `match` for one clip."""
    return tokens**2 // 4 * head_dim


def merging_macs(model: PrunedViT, r: int) -> tuple[int, int]:
    """Multiply-accumulates of one clip: by the paper's count, and with matching and head."""
    dim, extra, tokens = model.embed_dim, model.num_extra_tokens, model.num_extra_tokens + model.num_patches
    paper, matching = model.num_patches * PATCH**2 * dim, 0
    for _ in model.blocks:
        merged = mergeable(tokens, r, extra)
        paper += block_macs(tokens, tokens - merged, dim)
        matching += matching_macs(tokens, dim // model.num_heads)
        tokens -= merged
    return paper, paper + matching + dim * model.num_classes


def merging_for(model: PrunedViT, macs: int) -> int:
    """The ``r`` for which the multiply-accumulates by the paper's count are closest to ``macs``."""
    return min(range(model.num_patches), key=lambda r: abs(merging_macs(model, r)[0] - macs))
