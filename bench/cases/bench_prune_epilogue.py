"""Sum of partial scores, selection and gather of two tensors."""

import torch

from bench.harness.op_cases import HEADS, compiled, extra_tokens, op_providers, random_scores, random_tokens
from bench.harness.op_peers import topk_and_gathers
from pruneattn.ops import prune_epilogue

LEVELS, OP = ("op",), "prune_epilogue"


def sum_topk_and_gathers(partial_scores, x, y, keep, extra_tokens):
    scores = partial_scores.sum(1)
    return scores, *topk_and_gathers(scores, x, y, keep, extra_tokens)


ALTERNATIVES = {"torch.topk": sum_topk_and_gathers, "torch.topk, compiled": compiled(sum_topk_and_gathers)}


def random_partial_scores(case):
    """A row for each head ``[B, 12, P]``. All but one are zeros, so that the order of the sum does not change the bits
    of the scores.
    """
    scores = random_scores(case)
    return torch.stack([scores, *[torch.zeros_like(scores)] * (HEADS - 1)], 1)


def providers(case):
    partial_scores, x = random_partial_scores(case), random_tokens(case)
    patches = partial_scores.shape[2]
    return op_providers(
        case,
        prune_epilogue,
        ALTERNATIVES,
        partial_scores,
        x,
        x.flip(1),
        patches // 2,
        extra_tokens(case),
        tolerance=0,
        unread=2 * (patches - patches // 2),
    )


def test_prune_epilogue(measure, case):
    measure(case, providers(case))
