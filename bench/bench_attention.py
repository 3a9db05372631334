import pytest
import torch.nn.functional as F
from shapes import ATTENTION_CASES, random_qkv, tolerance

from pruneattn.backend import NAMES
from pruneattn.ops import attention


def eager(q, k, v):
    """The whole softmax matrix, in the dtype of the inputs."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v


ALTERNATIVES = {"SDPA": F.scaled_dot_product_attention, "eager": eager}


@pytest.mark.parametrize("provider", [*NAMES, *ALTERNATIVES])
@pytest.mark.parametrize("tokens", [65, 257, 513])
@pytest.mark.parametrize(**ATTENTION_CASES)
def test_attention(measure, provider, device, dtype, batch, tokens):
    measure(attention, provider, ALTERNATIVES, *random_qkv(batch, tokens, device, dtype), **tolerance(dtype))
