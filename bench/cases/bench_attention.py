"""Attention of all queries, and of the queries of kept tokens only, as a pruning block needs it."""

import torch.nn.functional as F

from bench.harness.op_cases import by_each_kernel, op_providers, random_qkv
from bench.harness.op_peers import softmax_matrix
from pruneattn.ops import attention

LEVELS, OP = ("op",), "attention"


def eager(q, k, v):
    """The whole softmax matrix, in the dtype of the inputs."""
    return softmax_matrix(q, k) @ v


ALTERNATIVES = {"SDPA": F.scaled_dot_product_attention, "eager": eager}


def providers(case):
    q, k, v = random_qkv(case)
    rows = []
    for part, queries in {None: q, "queries of every other token": q[:, :, ::2]}.items():
        ways = ALTERNATIVES | by_each_kernel("SDPA", F.scaled_dot_product_attention, queries, k, v)
        macs = 2 * queries.numel() * case.tokens
        rows += [row._replace(part=part) for row in op_providers(case, attention, ways, queries, k, v, macs=macs)]
    return rows


def test_attention(measure, case):
    measure(case, providers(case))
