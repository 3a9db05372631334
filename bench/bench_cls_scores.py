import pytest
import torch

from pruneattn.backend import NAMES
from pruneattn.ops import cls_scores


def eager(q_cls, k, extra_tokens):
    """In the dtype of the inputs."""
    logits = (q_cls.unsqueeze(2) @ k.transpose(-2, -1)).squeeze(2) * k.shape[-1] ** -0.5
    return logits.softmax(-1)[:, :, extra_tokens:].mean(1).float()


ALTERNATIVES = {"eager": eager}


@pytest.mark.parametrize("provider", [*NAMES, *ALTERNATIVES])
@pytest.mark.parametrize("tokens", [66, 514])
def test_cls_scores(measure, provider, device, dtype, batch, tokens):
    q, k, _ = torch.randn(batch, tokens, 3, 12, 64, device=device, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    measure(cls_scores, provider, ALTERNATIVES, q[:, :, 0], k, 2, rtol=tolerance, atol=tolerance)
