import torch.nn.functional as F

from bench.op_cases import op_providers, random_qkv
from pruneattn.ops import attention

LEVELS, OP = ("op",), "attention"


def eager(q, k, v):
    """The whole softmax matrix, in the dtype of the inputs."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v


ALTERNATIVES = {"SDPA": F.scaled_dot_product_attention, "eager": eager}


def providers(case):
    q, k, v = random_qkv(case)
    return op_providers(case, attention, ALTERNATIVES, q, k, v, macs=2 * q.numel() * case.tokens)


def test_attention(side_by_side, case):
    side_by_side(case, providers(case))
