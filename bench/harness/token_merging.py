"""Token merging in the way of ToMe (Bolya et al., 2023): similar tokens become one in every block, none is dropped.

Between attention and MLP, every second token (A) looks for the token among the others (B) whose key, averaged over
heads, is nearest; the ``r`` best pairs become their mean, weighted by how many tokens each stands for. Attention counts
that number too: log size is added to the logits. Extra tokens are never merged. Other than ToMe, which reorders its
tokens, the ones that are left stay in their order. Written for comparison, on the layers of a model of ours.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from pruneattn import ops
from pruneattn.constants import PATCH
from pruneattn.models.macs import block_macs


class MergingViT(nn.Module):
    """A model of ours (optimized or not) that merges ``r`` tokens in every block in place of pruning."""

    def __init__(self, model, r):
        super().__init__()
        self.model, self.r = model, r

    def forward(self, fbank):
        x, size = self.merge_features(fbank)
        if size is None or self.model.num_extra_tokens == 2:
            return self.model.forward_head(x)
        # The head's mean over patches counts each for as many as it stands for.
        weights = size[:, 1:] / size[:, 1:].mean(1, keepdim=True)  # [B, P, 1]
        return self.model.forward_head(torch.cat([x[:, :1], (x[:, 1:] * weights).to(x.dtype)], 1))

    def merge_features(self, fbank):
        """Tokens after the last block ``[B, N, C]``, and for how many each stands, ``[B, N, 1]`` (None: for itself)."""
        model = self.model
        x, size = model.prepend_extra_tokens(model.embed(fbank)), None
        for block in model.blocks:
            x, size = merging_block(block, x, size, self.r, model.num_extra_tokens)
        return x, size


def merging_block(block, x, size, r, extra):
    """A block of ours on tokens ``x`` ``[B, N, C]`` of ``size`` ``[B, N, 1]``, with merging; the new tokens and sizes."""
    q, k, v = block.attn.project(block.norm1(x), "qkv")
    bias = None if size is None else size.log().to(q.dtype)[:, None, None, :, 0]  # [B, 1, 1, N]
    attended = block.attn.merge_heads(F.scaled_dot_product_attention(q, k, v, bias))
    x = block.attn.proj.add(attended, x)
    r = mergeable(x.shape[1], r, extra)
    if r:
        x, size = merge(x, size, match(k.mean(1), r, extra))
    return block.mlp.fc2.add(block.mlp.fc1.gelu(block.norm2(x)), x), size


def mergeable(tokens, r, extra):
    """How many of so many tokens can be merged, up to ``r``: those at even places that are no extra tokens."""
    return max(0, min(r, (tokens + 1) // 2 - (extra + 1) // 2)) if tokens - extra > 1 else 0


def match(keys, r, extra):
    """Pairs to merge, by the keys ``[B, N, D]``: places ``[B, r]`` of those that go, and of those that take them in."""
    keys = F.normalize(keys.float(), dim=-1)
    similarity = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)  # [B, A, B']
    similarity[:, : (extra + 1) // 2] = -math.inf
    similarity[:, :, : extra // 2] = -math.inf
    best, partner = similarity.max(-1)  # [B, A]
    gone = best.topk(r).indices  # [B, r]
    return 2 * gone, 2 * partner.gather(1, gone) + 1


def merge(x, size, pairs):
    """Tokens ``[B, N, C]`` and sizes ``[B, N, 1]`` (None: all 1) after merging ``pairs``, in their order."""
    gone, into = pairs
    batch, tokens, dim = x.shape
    size = x.new_ones(batch, tokens, 1, dtype=torch.float32) if size is None else size
    total = x * size  # float32 [B, N, C]
    total = total.scatter_add(1, into.unsqueeze(-1).expand(-1, -1, dim), ops.gather_tokens(total, gone, 0))
    size = size.scatter_add(1, into.unsqueeze(-1), size.gather(1, gone.unsqueeze(-1)))
    stays = torch.ones(batch, tokens, device=x.device).scatter(1, gone, 0.0)
    rows = ops.select_tokens(stays, tokens - gone.shape[1])  # [B, N - r]
    size = ops.gather_tokens(size, rows, 0)
    return (ops.gather_tokens(total, rows, 0) / size).to(x.dtype), size


def matching_macs(tokens, head_dim):
    """Multiply-accumulates of `match` on one clip."""
    return tokens**2 // 4 * head_dim


def merging_macs(model, r):
    """Multiply-accumulates of one clip: ``(by the paper's count, with matching and head)``."""
    dim, extra, tokens = model.embed_dim, model.num_extra_tokens, model.num_extra_tokens + model.num_patches
    paper, matching = model.num_patches * PATCH**2 * dim, 0
    for _ in model.blocks:
        merged = mergeable(tokens, r, extra)
        paper += block_macs(tokens, tokens - merged, dim)
        matching += matching_macs(tokens, dim // model.num_heads)
        tokens -= merged
    return paper, paper + matching + dim * model.num_classes


def merging_for(model, macs):
    """The ``r`` whose count by the paper is nearest to ``macs``."""
    return min(range(model.num_patches), key=lambda r: abs(merging_macs(model, r)[0] - macs))
