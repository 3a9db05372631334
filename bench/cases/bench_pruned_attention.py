"""From queries, keys and values to the kept rows, compared with the best combinations of PyTorch's operators."""

import torch
import torch.nn.functional as F

from bench.harness.op_cases import by_each_kernel, compiled, extra_tokens, op_providers, random_qkv, random_tokens
from bench.harness.op_peers import column_mean, softmax_matrix, topk_and_gathers
from pruneattn.ops import pruned_attention

LEVELS, OP = ("op",), "pruned_attention"


def separate_passes(q, k, v, x, keep, extra_tokens):
    """Fused attention, a separate score, TopK and gathers.

    The softmax is in float32, because different scores can be equal in half precision.
    """
    out = F.scaled_dot_product_attention(q, k, v)
    weights = softmax_matrix(q, k, torch.float32)
    scores = column_mean(weights, extra_tokens)
    return scores, *topk_and_gathers(scores, x, out.transpose(1, 2).flatten(2), keep, extra_tokens)


def attention_alone(q, k, v, x, keep, extra_tokens):
    """A lower bound: fused attention without score and selection."""
    F.scaled_dot_product_attention(q, k, v)
    return ()  # no result to compare


ALTERNATIVES = {
    "SDPA, separate score, torch.topk": separate_passes,
    "SDPA, separate score, torch.topk, compiled": compiled(separate_passes),
    "SDPA alone": attention_alone,
}


def queries_keys_and_values(case, keep):
    """The scores of kept and dropped patches are so far apart that rounding does not change the selection."""
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


def test_pruned_attention(measure, case):
    measure(case, providers(case))
