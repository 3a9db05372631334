import pytest
import torch

from pruneattn.backend import NAMES
from pruneattn.ops import prune_tokens


def topk_and_gathers(scores, x, y, keep, extra_tokens):
    index = scores.topk(keep, sorted=False).indices.sort(1).values
    rows = index.unsqueeze(-1).expand(-1, -1, x.shape[-1])
    x, y = (torch.cat([t[:, :extra_tokens], t[:, extra_tokens:].gather(1, rows)], 1) for t in (x, y))
    return index, x, y


ALTERNATIVES = {"torch.topk": topk_and_gathers}


@pytest.mark.parametrize("provider", [*NAMES, *ALTERNATIVES])
@pytest.mark.parametrize("patches", [64, 512])
def test_prune_tokens(measure, provider, device, dtype, batch, patches):
    scores = torch.rand(batch, patches, device=device)
    x, y = torch.randn(2, batch, 1 + patches, 768, device=device, dtype=dtype)
    measure(prune_tokens, provider, ALTERNATIVES, scores, x, y, patches // 2, 1, rtol=0, atol=0)
