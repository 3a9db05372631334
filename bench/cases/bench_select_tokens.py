"""Selection of the highest scores."""

from bench.harness.op_cases import op_providers, random_scores
from pruneattn.ops import select_tokens

LEVELS, OP = ("op",), "select_tokens"


def topk(scores, keep):
    return scores.topk(keep, sorted=False).indices.sort(1).values


def providers(case):
    scores = random_scores(case)
    return op_providers(case, select_tokens, {"torch.topk": topk}, scores, scores.shape[1] // 2)


def test_select_tokens(measure, case):
    measure(case, providers(case))
