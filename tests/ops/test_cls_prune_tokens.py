import pytest
import torch

from pruneattn import use_backend
from pruneattn.ops import cls_prune_tokens, cls_scores, prune_tokens

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.fixture
def check(cases):
    def check(q_cls, k, x, y, keep, extra_tokens, scale=None):
        scores, index, *kept = cls_prune_tokens(q_cls, k, x, y, keep, extra_tokens, scale)
        cases.assert_scores_close(scores, cases.exact_cls_scores(q_cls, k, extra_tokens, scale))
        expected_index, *expected = prune_tokens(scores, x, y, keep, extra_tokens)
        assert torch.equal(index, expected_index)
        for ours, tokens in zip(kept, expected, strict=True):
            assert ours.dtype == tokens.dtype and ours.is_contiguous() and torch.equal(ours, tokens)

    return check


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extra_tokens", [0, 1, 2])
def test_equals_cls_scores_and_prune_tokens(place, interpreted, cases, check, dtype, extra_tokens):
    real = (1, 2, 514, 64) if interpreted else (3, 12, 514, 64)
    for batch, heads, tokens, channels in ((1, 1, 3, 1), (2, 3, 17, 8), real, (1, 2, 70, 33)):
        q, k, _ = cases.packed_qkv(batch, heads, tokens, channels, dtype, place)
        x, y = torch.randn(batch, tokens, 6, device=place), torch.randn(batch, tokens, 5, device=place, dtype=dtype)
        patches = tokens - extra_tokens
        for keep, scale in ((1, None), ((patches + 1) // 2, -0.3), (patches, 0.0)):
            check(q[:, :, 0], k, x, y, keep, extra_tokens, scale)


def test_more_tokens_than_the_kernels_take(place, cases, check):
    q, k, _ = cases.packed_qkv(1, 2, 5000, 8, torch.float32, place)
    x = torch.randn(1, 5000, 3, device=place)
    check(q[:, :, 0], k, x, x, 70, 1)


def test_random_shapes_and_strides(place, interpreted, cases, check):
    for q, k, v, extra_tokens, scale in cases.random_cases(8 if interpreted else 40, place):
        x = v.transpose(1, 2).flatten(2)  # [B, N, H * D]
        check(q[:, :, 0], k, x, x[:, :, ::2], (k.shape[2] - extra_tokens + 1) // 2, extra_tokens, scale)


def test_equals_the_two_ops_with_nan(place, cases):
    q, k, _ = cases.packed_qkv(3, 2, 20, 8, torch.float32, place)
    k = k.clone()
    k[0, 1, 2], k[1, 0, 5, 0] = torch.nan, torch.inf
    x = torch.randn(3, 20, 4, device=place)
    scores, index, *kept = cls_prune_tokens(q[:, :, 0], k, x, x, 6, 1)
    with use_backend("reference"):
        assert torch.equal(scores.isnan(), cls_scores(q[:, :, 0], k, 1).isnan())
        for ours, expected in zip((index, *kept), prune_tokens(scores, x, x, 6, 1), strict=True):
            assert torch.equal(ours, expected)


def test_same_bits_twice(place):
    q_cls, k = torch.randn(4, 3, 64, device=place), torch.randn(4, 3, 514, 64, device=place)
    x = torch.randn(4, 514, 4, device=place)
    first = cls_prune_tokens(q_cls, k, x, x, 100, 2)
    for _ in range(3):
        assert all(map(torch.equal, first, cls_prune_tokens(q_cls, k, x, x, 100, 2)))


def test_gradients(any_device):
    q_cls, k = (torch.randn(s, device=any_device, requires_grad=True) for s in ((2, 3, 4), (2, 3, 9, 4)))
    x, y = (torch.randn(2, 9, c, device=any_device, dtype=torch.float64, requires_grad=True) for c in (3, 2))
    assert torch.autograd.gradcheck(lambda x, y: cls_prune_tokens(q_cls, k, x, y, 5, 1)[2:], (x, y))
    scores, index, _x_kept, y_kept = cls_prune_tokens(q_cls, k, x, y, 5, 1)
    assert not scores.requires_grad and not index.requires_grad
    grads = torch.autograd.grad(y_kept.sum(), (x, y, q_cls, k), allow_unused=True)
    assert grads[1].sum() == 2 * 6 * 2 and [grad is None for grad in grads] == [True, False, True, True]


def test_rejects_bad_arguments(any_device):
    q_cls, k, x, y = (torch.zeros(s, device=any_device) for s in ((2, 3, 4), (2, 3, 9, 4), (2, 9, 5), (2, 9, 6)))
    with pytest.raises(ValueError, match=r"q_cls: expected shape \[B, H, D\] = \[2, 3, 4\], got \[2, 3, 1, 4\]"):
        cls_prune_tokens(q_cls[:, :, None], k, x, y, 4, 1)
    with pytest.raises(TypeError, match="k: expected dtype torch.float32, the dtype of q_cls, got torch.float16"):
        cls_prune_tokens(q_cls, k.half(), x, y, 4, 1)
    with pytest.raises(ValueError, match="keep: expected 1 to 8 of 8 patches, got 9"):
        cls_prune_tokens(q_cls, k, x, y, 9, 1)
    with pytest.raises(ValueError, match=r"x: expected \[2, 1 \+ 8, C\] for k \[2, 3, 9, 4\] and .* got \[2, 8, 5\]"):
        cls_prune_tokens(q_cls, k, x[:, 1:], y, 4, 1)
    with pytest.raises(ValueError, match=r"y: expected \[2, 1 \+ 8, C\]"):
        cls_prune_tokens(q_cls, k, x, y[:1], 4, 1)
    with pytest.raises(ValueError, match="extra_tokens: expected 0 to 8 of 9 tokens, got 9"):
        cls_prune_tokens(q_cls, k, x, y, 1, 9)
