"""From queries, keys and values to the rows that stay, beside the best that PyTorch's own operators do for that."""

import torch
import torch.nn.functional as F

from bench.cases.bench_column_mean_attention import column_mean
from bench.cases.bench_prune_tokens import topk_and_gathers
from bench.harness.op_cases import by_each_kernel, compiled, extra_tokens, op_providers, random_qkv, random_tokens
from pruneattn.ops import pruned_attention

LEVELS, OP = ("op",), "pruned_attention"


def separate_passes(q, k, v, x, keep, extra_tokens):
    """Fused attention, a pass of its own for the score, TopK and gathers.

    The softmax is in float32: in half precision, scores tie that do not.
    """
    out = F.scaled_dot_product_attention(q, k, v)
    weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1, dtype=torch.float32)
    scores = column_mean(weights, extra_tokens)
    return scores, *topk_and_gathers(scores, x, out.transpose(1, 2).flatten(2), keep, extra_tokens)


def attention_alone(q, k, v, x, keep, extra_tokens):
    """The floor: fused attention, no score, nothing selected."""
    F.scaled_dot_product_attention(q, k, v)
    return ()  # none of our results


ALTERNATIVES = {
    "SDPA, separate score, torch.topk": separate_passes,
    "SDPA, separate score, torch.topk, compiled": compiled(separate_passes),
    "SDPA alone": attention_alone,
}


def queries_keys_and_values(case, keep):
    """The scores of kept and of dropped patches lie apart: however they are rounded, the selection is the same."""
    q, k, v = random_qkv(case)
    direction = torch.randn_like(q[:, :, :1])  # [B, H, 1, D]
    q.copy_(direction + q / 8)
    rank = torch.randperm(case.tokens - extra_tokens(case), device=case.device)
    share = (rank + keep * (rank >= len(rank) - keep)) / (len(rank) + keep)
    share = F.pad(share, (extra_tokens(case), 0))  # [N]
    k.copy_(direction * share.unsqueeze(1))  # [B, H, N, D]: logits from 0 to about 8
    return q, k, v


def providers(case):
    patches = case.tokens - extra_tokens(case)
    keep = patches // 2
    args = *queries_keys_and_values(case, keep), random_tokens(case), keep, extra_tokens(case)
    ways = dict(ALTERNATIVES)
    for name in ("SDPA, separate score, torch.topk", "SDPA alone"):
        ways |= by_each_kernel(name, ALTERNATIVES[name], *args)
    return op_providers(
        case,
        pruned_attention,
        ways,
        *args,
        macs=2 * args[0].numel() * case.tokens,
        unread=patches - keep,
    )


def test_pruned_attention(side_by_side, case):
    side_by_side(case, providers(case))
