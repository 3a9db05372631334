"""Scores of the class token's query."""

from bench.harness.op_cases import extra_tokens, op_providers, random_qkv
from bench.harness.op_peers import eager_cls_scores
from pruneattn.ops import cls_scores

LEVELS, OP = ("op",), "cls_scores"


def providers(case):
    q, k, _ = random_qkv(case)
    alternatives = {"eager": eager_cls_scores}
    return op_providers(case, cls_scores, alternatives, q[:, :, 0], k, extra_tokens(case), macs=k.numel())


def test_cls_scores(measure, case):
    measure(case, providers(case))
