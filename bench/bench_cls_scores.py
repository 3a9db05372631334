import pytest
from shapes import ATTENTION_CASES, random_qkv, tolerance

from pruneattn.backend import NAMES
from pruneattn.ops import cls_scores


def eager(q_cls, k, extra_tokens):
    """In the dtype of the inputs."""
    logits = (q_cls.unsqueeze(2) @ k.transpose(-2, -1)).squeeze(2) * k.shape[-1] ** -0.5
    return logits.softmax(-1)[:, :, extra_tokens:].mean(1).float()


ALTERNATIVES = {"eager": eager}


@pytest.mark.parametrize("provider", [*NAMES, *ALTERNATIVES])
@pytest.mark.parametrize("tokens", [66, 258, 514])
@pytest.mark.parametrize(**ATTENTION_CASES)
def test_cls_scores(measure, provider, device, dtype, batch, tokens):
    q, k, _ = random_qkv(batch, tokens, device, dtype)
    measure(cls_scores, provider, ALTERNATIVES, q[:, :, 0], k, 2, **tolerance(dtype))
