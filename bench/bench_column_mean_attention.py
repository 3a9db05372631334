import pytest
import torch.nn.functional as F
from shapes import ATTENTION_CASES, random_qkv, tolerance

from pruneattn.backend import NAMES
from pruneattn.ops import column_mean_attention


def without_score(q, k, v, extra_tokens):
    """The floor: fused attention, which does not give the score."""
    return F.scaled_dot_product_attention(q, k, v)


def eager(q, k, v, extra_tokens):
    """What published implementations do: the whole softmax matrix, in the dtype of the inputs."""
    weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1)
    return weights @ v, weights.mean(1)[:, extra_tokens:, extra_tokens:].mean(1).float()


ALTERNATIVES = {"SDPA, no score": without_score, "eager": eager}


@pytest.mark.parametrize("provider", [*NAMES, *ALTERNATIVES])
@pytest.mark.parametrize("tokens", [65, 257, 513])
@pytest.mark.parametrize(**ATTENTION_CASES)
def test_column_mean_attention(measure, provider, device, dtype, batch, tokens):
    q, k, v = random_qkv(batch, tokens, device, dtype)
    measure(column_mean_attention, provider, ALTERNATIVES, q, k, v, 1, **tolerance(dtype))
