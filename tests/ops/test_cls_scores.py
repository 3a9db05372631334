import pytest
import torch

from pruneattn import use_backend
from pruneattn.ops import cls_scores

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.fixture
def check(cases):
    def check(q_cls, k, extra_tokens, scale=None):
        expected = cases.exact_cls_scores(q_cls, k, extra_tokens, scale)
        cases.assert_scores_close(cls_scores(q_cls, k, extra_tokens, scale), expected)

    return check


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extra_tokens", [0, 1, 2])
def test_values(place, interpreted, cases, check, dtype, extra_tokens):
    real = (1, 2, 514, 64) if interpreted else (3, 12, 514, 64)
    for batch, heads, tokens, channels in ((1, 1, 3, 1), (2, 3, 17, 8), real, (1, 2, 70, 33)):
        q, k, _ = cases.packed_qkv(batch, heads, tokens, channels, dtype, place)
        for scale in (None, *cases.SCALES):
            check(q[:, :, 0], k, extra_tokens, scale)


def test_strided_channels(place, check):
    k = torch.randn(2, 3, 8, 10, device=place).transpose(2, 3)
    check(torch.randn(2, 8, 3, device=place).transpose(1, 2), k, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_small_size(place, interpreted, check, dtype):
    for tokens in range(2, 41, 5 if interpreted else 1):
        for extra_tokens in range(min(3, tokens)):
            q_cls, k = torch.randn(2, 2, 5, device=place), torch.randn(2, 2, tokens, 5, device=place)
            check(q_cls.to(dtype), k.to(dtype), extra_tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_sizes_and_many_tokens(place, cases, check, dtype):
    # 5000 tokens are more than the CUDA kernel takes.
    for tokens, sizes in ((35, cases.HEAD_SIZES), (257, (64,)), (513, (64,)), (4096, (8, 64)), (5000, (8,))):
        for channels in sizes:
            q, k, _ = cases.packed_qkv(1, 2, tokens, channels, dtype, place)
            check(q[:, :, 0], k, 2)


def test_random_shapes_and_strides(place, interpreted, cases, check):
    for q, k, _, extra_tokens, scale in cases.random_cases(16 if interpreted else 80, place):
        check(q[:, :, 0], k, extra_tokens, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_selects_like_float64(place, cases, dtype):
    for tokens, channels in ((129, 16), (514, 64)):
        q, k, _ = cases.packed_qkv(4, 3, tokens, channels, dtype, place)
        scores, truth = cls_scores(q[:, :, 0], k, 2), cases.exact_cls_scores(q[:, :, 0], k, 2)
        for keep in (1, tokens // 2, tokens - 10):
            cases.assert_selects_like_exact(scores, truth, keep)


def test_same_bits_twice(place):
    q_cls, k = torch.randn(4, 3, 64, device=place), torch.randn(4, 3, 514, 64, device=place)
    first = cls_scores(q_cls, k, 2)
    assert all(torch.equal(first, cls_scores(q_cls, k, 2)) for _ in range(3))


def test_nan_reaches_the_score(place):
    q_cls, k = torch.randn(2, 2, 4, device=place), torch.randn(2, 2, 6, 4, device=place)
    k[0, 1, 2] = torch.nan
    scores = cls_scores(q_cls, k, 1)
    assert scores[0].isnan().all() and not scores[1].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_special_values_match_the_reference(place, interpreted, cases, dtype):
    for tokens in (34,) if interpreted else (6, 20, 37):
        for token, row, scale in ((0, 0, None), (2, 2, -0.3), (tokens - 1, 0, 0.4)):
            for what, (q, k, _) in cases.special_cases(dtype, place, token, tokens):
                scores = cls_scores(q[:, :, row], k, 1, scale)
                with use_backend("reference"):
                    expected = cls_scores(q[:, :, row], k, 1, scale)
                assert torch.equal(scores.isnan(), expected.isnan()), (what, token, tokens)
                cases.assert_scores_close(scores, expected)


def test_is_not_differentiable(any_device):
    q_cls, k = (torch.randn(shape, device=any_device, requires_grad=True) for shape in ((2, 2, 4), (2, 2, 6, 4)))
    scores = cls_scores(q_cls, k, 1)
    assert not scores.requires_grad
    (scores.sum() * k.sum()).backward()
    torch.testing.assert_close(k.grad, scores.sum().expand_as(k))
    assert q_cls.grad is None


def test_rejects_bad_arguments(any_device):
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
    for q, empty in ((q_cls[..., :0], k[..., :0]), (q_cls[:, :0], k[:, :0])):
        with pytest.raises(ValueError, match=r"k: expected \[B, H, N, D\] empty in B at most, got"):
            cls_scores(q, empty, 1)
