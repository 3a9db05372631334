import torch

from bench.cases.bench_cls_scores import eager
from bench.cases.bench_prune_tokens import topk_and_gathers
from bench.harness.op_cases import compiled, extra_tokens, op_providers, random_qkv, random_tokens
from pruneattn.ops import cls_prune_tokens

LEVELS, OP = ("op",), "cls_prune_tokens"


def eager_and_topk(q_cls, k, x, y, keep, extra_tokens):
    """In float32: in half precision, scores tie that do not."""
    scores = eager(q_cls.float(), k.float(), extra_tokens)
    return scores, *topk_and_gathers(scores, x, y, keep, extra_tokens)


ALTERNATIVES = {"eager": eager_and_topk, "eager, compiled": compiled(eager_and_topk)}


def queries_and_keys(case):
    """As a model's projection makes them, of scores that lie apart: however they round, the selection is the same."""
    q, k, _ = random_qkv(case)
    q_cls = q[:, :, 0]
    share = torch.randperm(case.tokens, device=case.device) / case.tokens
    k.copy_(q_cls.unsqueeze(2) * share.unsqueeze(1))  # [B, H, N, D]: logits from 0 to about 8
    return q_cls, k


def providers(case):
    (q_cls, k), x = queries_and_keys(case), random_tokens(case)
    patches = case.tokens - extra_tokens(case)
    keep = patches // 2
    return op_providers(
        case,
        cls_prune_tokens,
        ALTERNATIVES,
        q_cls,
        k,
        x,
        x.flip(1),
        keep,
        extra_tokens(case),
        macs=k.numel(),
        unread=2 * (patches - keep),
    )


def test_cls_prune_tokens(side_by_side, case):
    side_by_side(case, providers(case))
