"""Gather of the extra tokens and the kept patches."""

import torch

from bench.harness.op_cases import extra_tokens, op_providers, random_scores, random_tokens
from pruneattn.ops import gather_tokens, select_tokens

LEVELS, OP = ("op",), "gather_tokens"


def advanced_indexing(x, index, extra_tokens):
    clips = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    return torch.cat([x[:, :extra_tokens], x[clips, index + extra_tokens]], 1)


def providers(case):
    scores = random_scores(case)
    patches = scores.shape[1]
    index = select_tokens(scores, patches // 2)
    return op_providers(
        case,
        gather_tokens,
        {"indexing": advanced_indexing},
        random_tokens(case),
        index,
        extra_tokens(case),
        tolerance=0,
        unread=patches - patches // 2,
    )


def test_gather_tokens(measure, case):
    measure(case, providers(case))
