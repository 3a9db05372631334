import pytest
import torch

from pruneattn.backend import NAMES
from pruneattn.ops import gather_tokens, select_tokens


def advanced_indexing(x, index, extra_tokens):
    clips = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    return torch.cat([x[:, :extra_tokens], x[clips, index + extra_tokens]], 1)


ALTERNATIVES = {"indexing": advanced_indexing}


@pytest.mark.parametrize("provider", [*NAMES, *ALTERNATIVES])
@pytest.mark.parametrize("patches", [64, 512])
def test_gather_tokens(measure, provider, device, dtype, batch, patches):
    x = torch.randn(batch, 1 + patches, 768, device=device, dtype=dtype)
    index = select_tokens(torch.rand(batch, patches, device=device), patches // 2)
    measure(gather_tokens, provider, ALTERNATIVES, x, index, 1, rtol=0, atol=0)
