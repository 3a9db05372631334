import pytest
import torch

from pruneattn.backend import NAMES
from pruneattn.ops import select_tokens


def topk(scores, keep):
    return scores.topk(keep, sorted=False).indices.sort(1).values


ALTERNATIVES = {"torch.topk": topk}


@pytest.mark.parametrize("provider", [*NAMES, *ALTERNATIVES])
@pytest.mark.parametrize("patches", [64, 512])
def test_select_tokens(measure, provider, device, batch, patches):
    measure(select_tokens, provider, ALTERNATIVES, torch.rand(batch, patches, device=device), patches // 2)
