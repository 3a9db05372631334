import sys

import pytest
import torch

from pruneattn.ops import attention
from pruneattn.ops.backend import choose

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.fixture
def check(cases):
    def check(q, k, v, scale=None):
        out = attention(q, k, v, scale)
        assert out.dtype == q.dtype
        if out.device.type == "cpu":
            assert out.transpose(1, 2).is_contiguous()
        cases.assert_outputs_close(out, cases.exact_attention(q, k, v, scale))

    return check


@pytest.mark.parametrize("dtype", DTYPES)
def test_values(place, cases, check, dtype):
    for queries, *sizes in ((1, 1, 1, 2, 1), (5, 2, 3, 17, 8), (65, 3, 2, 65, 64), (9, 1, 2, 70, 33)):
        q, k, v = cases.packed_qkv(*sizes, dtype, place)
        check(q[:, :, :queries], k, v)
    check(k, q[:, :, :3], v[:, :, :3])  # more queries than keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_small_size(place, interpreted, cases, dtype):
    q, k, v = cases.packed_qkv(1, 1 if interpreted else 2, 40, 5, dtype, place)
    for tokens in range(2, 41, 5 if interpreted else 1):
        expected = cases.exact_attention(q, k[:, :, :tokens], v[:, :, :tokens])
        for queries in range(1 + tokens % 3, 41, 12 if interpreted else 3):
            out = attention(q[:, :, :queries], k[:, :, :tokens], v[:, :, :tokens])
            worst = (out - expected[:, :, :queries]).abs().max()
            assert worst <= 8 * cases.EPS[dtype], (queries, tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [65, 257, 513, 514])
def test_real_sizes(place, interpreted, cases, check, tokens, dtype):
    q, k, v = cases.packed_qkv(2, 1 if interpreted else 2, tokens, 64, dtype, place)
    q, k, v = (t[-1:] if interpreted else t for t in (q, k, v))
    check(q, k, v)
    check(q[:, :, : tokens // 2], k, v)


def test_many_tokens(place, interpreted, cases):
    q, k, v = cases.packed_qkv(1, 1, 4096, 16, torch.float32, place)
    few = q[:, :, :: 512 if interpreted else 64]  # every query has the same work
    for inputs in ((few, k, v), (q[:, :, 100:107], k[:, :, 1:], v[:, :, 1:])):
        cases.assert_output_error_at_most_twice_that_of_plain(attention(*inputs), *inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_sizes(place, cases, check, dtype):
    for channels in cases.HEAD_SIZES:
        q, k, v = cases.packed_qkv(1, 2, 37, channels, dtype, place)
        check(q, k, v)
        check(q[:, :, :7], k[:, :, :20], v[:, :, :20])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale(place, cases, check, dtype):
    for tokens in (16, 21, 37):
        q, k, v = cases.packed_qkv(2, 2, tokens, 7, dtype, place)
        for scale in cases.SCALES:
            check(q, k, v, scale)
    assert not torch.equal(attention(q, k, v, 0.9), attention(q, k, v))


def test_random_shapes_and_strides(place, interpreted, cases, check):
    for q, k, v, _, scale in cases.random_cases(8 if interpreted else 40, place):
        check(q[:, :, : int(torch.randint(1, q.shape[2] + 1, ()))], k, v, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [65, 257])
def test_error_is_at_most_twice_that_of_plain_attention(place, interpreted, cases, dtype, tokens):
    q, k, v = cases.packed_qkv(2, 1 if interpreted else 3, tokens, 64, dtype, place)
    cases.assert_errors_at_most_twice_those_of_plain(attention, q, k, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_of_an_average_of_many_values_away_from_zero(place, cases, dtype):
    """Here rounding errors add up most."""
    q, k, v = cases.packed_qkv(1, 2, 513, 16, dtype, place, spread=0.1)
    cases.assert_output_error_at_most_twice_that_of_plain(attention(q, k, v + 1), q, k, v + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_special_values_reach_the_rows_they_belong_to(kernels, interpreted, cases, dtype):
    """As in softmax and products. PyTorch's attention loses some NaN."""
    for tokens in (34,) if interpreted else (6, 20, 37):
        for token in (0, tokens - 1):
            for what, (q, k, v) in cases.special_cases(dtype, kernels, token, tokens):
                q = q[:, :, 1:] if token else q
                weights = (q.float() * 0.4 @ k.float().transpose(-2, -1)).softmax(-1)  # overflows in float32, too
                out, expected = attention(q, k, v, 0.4), weights.to(dtype) @ v
                assert torch.equal(out.isnan(), expected.isnan()), (what, token, tokens)
                cases.assert_outputs_close(out, expected)


def test_same_bits_twice(place, interpreted, cases):
    if place.type == "cuda" and choose("attention", "cuda") is sys.modules["pruneattn.ops.attention"].reference:
        pytest.skip("PyTorch's gradients are not the same in every run on a GPU")
    q, k, v = cases.leaves(
        cases.packed_qkv(1 if interpreted else 2, 1 if interpreted else 3, 130, 16, torch.float32, place)
    )

    def run():
        out = attention(q[:, :, 3:], k, v)
        return out, *torch.autograd.grad(out.sum(), (q, k, v))

    first = run()
    for _ in range(1 if interpreted else 3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_gradients(any_device, cases):
    q, k, v = cases.leaves(cases.packed_qkv(2, 2, 5, 3, torch.float64, any_device))
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q[:, :, :3], k, v), (q, k, v))
    assert torch.autograd.gradcheck(lambda *qkv: attention(*qkv, 0.7), (q, k, v))


@pytest.mark.parametrize("device", ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.device)])
def test_rejects_bad_arguments(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    q = torch.zeros(2, 3, 9, 4, device=device)
    with pytest.raises(ValueError, match=r"q: expected shape \[B, H, M, D\], got \[3, 9, 4\]"):
        attention(q[0], q[0], q[0])
    with pytest.raises(ValueError, match=r"k: expected shape \[B, H, N, D\] = \[2, 3, 9, 4\], got \[2, 3, 9, 3\]"):
        attention(q, q[..., 1:], q)
    with pytest.raises(ValueError, match=r"v: expected shape \[B, H, N, D\] = \[2, 3, 8, 4\], got \[2, 3, 9, 4\]"):
        attention(q, q[:, :, 1:], q)
    with pytest.raises(ValueError, match=r"k: expected shape .* got \[1, 3, 9, 4\]"):
        attention(q, q[:1], q[:1])
    with pytest.raises(TypeError, match="v: expected dtype torch.float32, the dtype of q, got torch.bfloat16"):
        attention(q, q, q.bfloat16())
    with pytest.raises(TypeError, match="q: expected dtype torch.float32 or .* got torch.int64"):
        attention(q.long(), q.long(), q.long())
    other = "cpu" if device == "meta" else "meta"
    with pytest.raises(ValueError, match=f"k: expected device {device}.*, the device of q, got {other}"):
        attention(q, torch.zeros_like(q, device=other), q)
    with pytest.raises(ValueError, match=r"q: expected \[B, H, M, D\] empty in B at most, got \[2, 3, 0, 4\]"):
        attention(q[:, :, :0], q, q)
    for empty in (q[:, :, :0], q[..., :0], q[:, :0]):
        with pytest.raises(ValueError, match="empty in B at most"):
            attention(q if empty.shape[2] == 0 else empty, empty, empty)
    assert attention(q[:0], q[:0], q[:0]).shape == (0, 3, 9, 4)
