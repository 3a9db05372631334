import torch

from bench.harness.op_cases import extra_tokens, op_providers, random_scores, random_tokens
from pruneattn.ops import prune_tokens

LEVELS, OP = ("op",), "prune_tokens"


def topk_and_gathers(scores, x, y, keep, extra_tokens):
    index = scores.topk(keep, sorted=False).indices.sort(1).values
    rows = index.unsqueeze(-1).expand(-1, -1, x.shape[-1])
    x, y = (torch.cat([t[:, :extra_tokens], t[:, extra_tokens:].gather(1, rows)], 1) for t in (x, y))
    return index, x, y


def providers(case):
    scores, x = random_scores(case), random_tokens(case)
    patches = scores.shape[1]
    return op_providers(
        case,
        prune_tokens,
        {"torch.topk": topk_and_gathers},
        scores,
        x,
        x.flip(1),
        patches // 2,
        extra_tokens(case),
        tolerance=0,
        unread=2 * (patches - patches // 2),
    )


def test_prune_tokens(side_by_side, case):
    side_by_side(case, providers(case))
