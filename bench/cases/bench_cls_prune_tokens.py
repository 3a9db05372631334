"""Scores of the class token's query, selection and gather in one op."""

import torch

from bench.harness.op_cases import compiled, extra_tokens, op_providers, random_qkv, random_tokens
from bench.harness.op_peers import eager_cls_scores, topk_and_gathers
from pruneattn.ops import cls_prune_tokens

LEVELS, OP = ("op",), "cls_prune_tokens"


def eager_and_topk(q_cls, k, x, y, keep, extra_tokens):
    """In float32, because different scores can be equal in half precision."""
    scores = eager_cls_scores(q_cls.float(), k.float(), extra_tokens)
    return scores, *topk_and_gathers(scores, x, y, keep, extra_tokens)


ALTERNATIVES = {"eager": eager_and_topk, "eager, compiled": compiled(eager_and_topk)}


def queries_and_keys(case):
    """Strided like the output of a projection, with scores so far apart that rounding does not change the choice."""
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


def test_cls_prune_tokens(measure, case):
    measure(case, providers(case))
