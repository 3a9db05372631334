import pytest
import torch

from pruneattn.ops import cls_scores


def exact(q_cls, k, extra_tokens, scale=None):
    """Paper, eq. 2b, in float64."""
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("bhd,bhnd->bhn", q_cls.double(), k.double()) * scale
    return logits.softmax(-1).mean(1)[:, extra_tokens:]


def check(q_cls, k, extra_tokens, scale=None):
    scores = cls_scores(q_cls, k, extra_tokens, scale)
    assert scores.dtype == torch.float32 and scores.is_contiguous()
    torch.testing.assert_close(scores.double(), exact(q_cls, k, extra_tokens, scale), rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("extra_tokens", [0, 1, 2])
def test_values(any_device, dtype, extra_tokens):
    for batch, heads, tokens, channels in ((1, 1, 3, 1), (2, 3, 17, 8), (3, 12, 514, 64), (1, 2, 70, 33)):
        packed = torch.randn(batch, tokens, 3, heads, channels, device=any_device).mul(1.5).to(dtype)
        q, k, _ = packed.permute(2, 0, 3, 1, 4).unbind(0)
        check(q[:, :, 0], k, extra_tokens)
        check(q[:, :, 0], k, extra_tokens, 0.3)


def test_channels_apart(any_device):
    k = torch.randn(2, 3, 8, 10, device=any_device).transpose(2, 3)
    check(torch.randn(2, 8, 3, device=any_device).transpose(1, 2), k, 1)


def test_every_small_size(any_device):
    for tokens in range(2, 40):
        check(torch.randn(2, 2, 5, device=any_device), torch.randn(2, 2, tokens, 5, device=any_device), tokens % 2)


def test_same_bits_twice(any_device):
    q_cls, k = torch.randn(4, 3, 64, device=any_device), torch.randn(4, 3, 514, 64, device=any_device)
    first = cls_scores(q_cls, k, 2)
    assert all(torch.equal(first, cls_scores(q_cls, k, 2)) for _ in range(3))


def test_nan_reaches_the_score(any_device):
    q_cls, k = torch.randn(2, 2, 4, device=any_device), torch.randn(2, 2, 6, 4, device=any_device)
    k[0, 1, 2] = torch.nan
    scores = cls_scores(q_cls, k, 1)
    assert scores[0].isnan().all() and not scores[1].isnan().any()


def test_is_not_differentiable(any_device):
    q_cls, k = (torch.randn(shape, device=any_device, requires_grad=True) for shape in ((2, 2, 4), (2, 2, 6, 4)))
    scores = cls_scores(q_cls, k, 1)
    assert not scores.requires_grad
    (scores.sum() * k.sum()).backward()
    torch.testing.assert_close(k.grad, scores.sum().expand_as(k))
    assert q_cls.grad is None


def test_refuses_bad_arguments(any_device):
    q_cls, k = torch.zeros(2, 3, 4, device=any_device), torch.zeros(2, 3, 9, 4, device=any_device)
    with pytest.raises(ValueError, match=r"k: expected shape \[B, H, N, D\], got \[3, 9, 4\]"):
        cls_scores(q_cls, k[0], 1)
    with pytest.raises(ValueError, match=r"q_cls: expected shape \[B, H, D\] = \[2, 3, 4\], got \[2, 3, 1, 4\]"):
        cls_scores(q_cls[:, :, None], k, 1)
    with pytest.raises(TypeError, match="k: expected dtype torch.float32, the dtype of q_cls, got torch.float16"):
        cls_scores(q_cls, k.half(), 1)
    with pytest.raises(TypeError, match="q_cls: expected dtype torch.float32 or .* got torch.int64"):
        cls_scores(q_cls.long(), k, 1)
    with pytest.raises(ValueError, match="extra_tokens: expected 0 to 8 of 9 tokens, got 9"):
        cls_scores(q_cls, k, 9)
