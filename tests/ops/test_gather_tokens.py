import pytest
import torch

from pruneattn.ops import gather_tokens


def by_definition(x, index, extra_tokens):
    rows = [
        torch.cat([clip[:extra_tokens], clip[extra_tokens + numbers]]) for clip, numbers in zip(x, index, strict=True)
    ]
    return torch.stack(rows)


def check(x, index, extra_tokens):
    out = gather_tokens(x, index, extra_tokens)
    assert out.dtype == x.dtype and out.is_contiguous()
    torch.testing.assert_close(out, by_definition(x, index, extra_tokens), rtol=0, atol=0, equal_nan=True)


def random_index(batch, patches, keep, device):
    return torch.stack([torch.randperm(patches, device=device)[:keep] for _ in range(batch)])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64]
)
@pytest.mark.parametrize("extra_tokens", [0, 1, 2])
def test_values(device, dtype, extra_tokens):
    for channels in (1, 3, 16, 100):
        x = torch.randn(3, extra_tokens + 20, channels, device=device).mul(4).to(dtype)
        check(x, random_index(3, 20, 7, device), extra_tokens)


def test_copies_bits(device):
    """Rows keep NaN payloads and signed zeros."""
    x = torch.randint(-(2**31), 2**31 - 1, (2, 9, 6), device=device, dtype=torch.int32).view(torch.float32)
    index = random_index(2, 8, 5, device)
    assert torch.equal(gather_tokens(x, index, 1).view(torch.int32), by_definition(x.view(torch.int32), index, 1))


def test_strides(device):
    index = random_index(2, 10, 4, device)
    wide = torch.randn(4, 24, 30, device=device)
    check(wide[::2, 3:14, 5:26], index, 1)  # strided batch and tokens
    check(wide[:2, ::2, ::3][:, :11], index, 1)  # strided channels
    check(wide[:2].transpose(1, 2)[:, :11], index, 1)
    check(wide[:1, :11].expand(2, -1, -1), index, 1)
    check(wide[:2, :11], index.repeat_interleave(2, 1)[:, ::2], 1)
    check(wide[:2, :11].double().to(torch.complex128).mul(1j).conj().imag, index, 1)


def test_repeated_and_unordered_numbers(device):
    check(torch.randn(1, 5, 3, device=device), torch.tensor([[3, 0, 3, 3]], device=device), 1)


def test_random_shapes(device):
    for _ in range(30):
        batch, patches, channels = (int(torch.randint(1, high, ())) for high in (5, 200, 70))
        extra_tokens, keep = int(torch.randint(3, ())), int(torch.randint(1, patches + 1, ()))
        x = torch.randn(batch, extra_tokens + patches, channels, device=device)
        check(x, random_index(batch, patches, keep, device), extra_tokens)


def test_gradient_is_a_scatter(device):
    x = torch.randn(2, 9, 3, device=device, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[5, 2, 2], [0, 7, 1]], device=device)
    assert torch.autograd.gradcheck(lambda x: gather_tokens(x, index, 1), (x,))
    assert torch.autograd.gradgradcheck(lambda x: gather_tokens(x, index, 1).sin(), (x,))
    counts = torch.autograd.grad(gather_tokens(x, index, 1).sum(), x)[0][:, :, 0]
    assert counts.tolist() == [[1, 0, 0, 2, 0, 0, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0, 1]]


def test_rejects_numbers_out_of_range():
    for number in (8, -1):
        with pytest.raises((IndexError, RuntimeError), match=f"{number}"):
            gather_tokens(torch.zeros(1, 9, 2), torch.tensor([[0, number]]), 1)


def test_rejects_bad_arguments(device):
    x, index = torch.zeros(2, 9, 4, device=device), torch.zeros(2, 3, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"x: expected shape \[B, N, C\], got \[9, 4\]"):
        gather_tokens(x[0], index, 1)
    with pytest.raises(ValueError, match=r"index: expected shape \[B, keep\], got \[3\]"):
        gather_tokens(x, index[0], 1)
    with pytest.raises(ValueError, match="index: expected batch 2, the batch of x, got 1"):
        gather_tokens(x, index[:1], 1)
    with pytest.raises(TypeError, match="index: expected dtype torch.int64, got torch.int32"):
        gather_tokens(x, index.int(), 1)
    with pytest.raises(ValueError, match="index: expected 1 to 2 patch numbers per clip, got 3"):
        gather_tokens(x, index, 7)
    for extra_tokens in (-1, 9):
        with pytest.raises(ValueError, match=f"extra_tokens: expected 0 to 8 of 9 tokens, got {extra_tokens}"):
            gather_tokens(x, index, extra_tokens)
    with pytest.raises(ValueError, match=r"x: expected \[B, N, C\] empty in B at most, got \[2, 9, 0\]"):
        gather_tokens(x[..., :0], index, 1)
