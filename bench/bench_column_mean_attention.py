import pytest
import torch
import torch.nn.functional as F

from pruneattn.backend import NAMES
from pruneattn.ops import column_mean_attention


def without_score(q, k, v, extra_tokens):
    """The floor: fused attention, which does not give the score."""
    return F.scaled_dot_product_attention(q, k, v)


def eager(q, k, v, extra_tokens):
    """What published implementations do: the whole softmax matrix, in the dtype of the inputs."""
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
    return weights @ v, weights[:, :, extra_tokens:, extra_tokens:].mean((1, 2)).float()


ALTERNATIVES = {"SDPA, no score": without_score, "eager": eager}


@pytest.mark.parametrize("provider", [*NAMES, *ALTERNATIVES])
@pytest.mark.parametrize("tokens", [65, 513])
def test_column_mean_attention(measure, provider, device, dtype, batch, tokens):
    q, k, v = torch.randn(batch, tokens, 3, 12, 64, device=device, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    measure(column_mean_attention, provider, ALTERNATIVES, q, k, v, 1, rtol=tolerance, atol=tolerance)
