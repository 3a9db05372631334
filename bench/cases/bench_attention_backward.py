"""Forward and backward pass of attention with the column-mean score, as in a training step."""

from bench.harness.op_cases import by_each_kernel, extra_tokens, forward_and_backward, op_providers, random_qkv
from bench.harness.op_peers import SCORED_ATTENTION
from pruneattn.ops import column_mean_attention

LEVELS, OP = ("op",), "attention_backward"

ALTERNATIVES = {name: forward_and_backward(function) for name, function in SCORED_ATTENTION.items()}


def providers(case):
    q, k, v = random_qkv(case)
    args = q, k, v, extra_tokens(case)
    ways = ALTERNATIVES | by_each_kernel("SDPA, no score", ALTERNATIVES["SDPA, no score"], *args)
    ours = forward_and_backward(column_mean_attention)
    ours.__name__ = OP  # the op whose backends the rows name
    return op_providers(case, ours, ways, *args, macs=7 * q.numel() * case.tokens)


def test_attention_backward(measure, case):
    measure(case, providers(case))
