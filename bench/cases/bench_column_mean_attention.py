"""Attention with the column-mean score."""

from bench.harness.op_cases import by_each_kernel, extra_tokens, op_providers, random_qkv
from bench.harness.op_peers import SCORED_ATTENTION, attention_without_score
from pruneattn.ops import column_mean_attention

LEVELS, OP = ("op",), "column_mean_attention"

ALTERNATIVES = dict(SCORED_ATTENTION)


def providers(case):
    q, k, v = random_qkv(case)
    macs = 2 * q.numel() * case.tokens
    args = q, k, v, extra_tokens(case)
    ways = ALTERNATIVES | by_each_kernel("SDPA, no score", attention_without_score, *args)
    return op_providers(case, column_mean_attention, ways, *args, macs=macs)


def test_column_mean_attention(measure, case):
    measure(case, providers(case))
