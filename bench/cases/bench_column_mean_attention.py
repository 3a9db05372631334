import torch.nn.functional as F

from bench.harness.op_cases import by_each_kernel, extra_tokens, op_providers, random_qkv
from pruneattn.ops import column_mean_attention

LEVELS, OP = ("op",), "column_mean_attention"


def without_score(q, k, v, extra_tokens):
    """The floor: fused attention, which does not give the score."""
    return F.scaled_dot_product_attention(q, k, v)


def eager(q, k, v, extra_tokens):
    """What published implementations do: the whole softmax matrix, in the dtype of the inputs."""
    weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1)
    return weights @ v, column_mean(weights, extra_tokens)


def separate_score(q, k, v, extra_tokens):
    """Fused attention, and a pass of its own for the score: the queries times the keys once more."""
    weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1)
    return F.scaled_dot_product_attention(q, k, v), column_mean(weights, extra_tokens)


def column_mean(weights, extra_tokens):
    return weights.mean(1)[:, extra_tokens:, extra_tokens:].mean(1).float()


ALTERNATIVES = {"SDPA, no score": without_score, "eager": eager, "SDPA, separate score": separate_score}


def providers(case):
    q, k, v = random_qkv(case)
    macs = 2 * q.numel() * case.tokens
    args = q, k, v, extra_tokens(case)
    ways = ALTERNATIVES | by_each_kernel("SDPA, no score", without_score, *args)
    return op_providers(case, column_mean_attention, ways, *args, macs=macs)


def test_column_mean_attention(side_by_side, case):
    side_by_side(case, providers(case))
