"""Selection and gather of two tensors."""

from bench.harness.op_cases import extra_tokens, op_providers, random_scores, random_tokens
from bench.harness.op_peers import topk_and_gathers
from pruneattn.ops import prune_tokens

LEVELS, OP = ("op",), "prune_tokens"


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


def test_prune_tokens(measure, case):
    measure(case, providers(case))
