import math

import pytest
import torch

from pruneattn.ops import select_tokens


def by_definition(row, keep):
    """Rank NaN first, then by value, then by number. Return the kept numbers in ascending order."""
    ranked = sorted(range(len(row)), key=lambda i: (not math.isnan(row[i]), 0 if math.isnan(row[i]) else -row[i], i))
    return sorted(ranked[:keep])


def check(scores, keep):
    index = select_tokens(scores, keep)
    assert index.dtype == torch.int64 and index.is_contiguous() and index.device == scores.device
    assert index.tolist() == [by_definition(row, keep) for row in scores.tolist()]


@pytest.mark.parametrize("patches", [1, 2, 3, 7, 31, 32, 33, 64, 65, 255, 512, 1212, 4096, 5000])
def test_values(device, patches):
    scores = torch.randn(3, patches, device=device)
    for keep in {1, (patches + 1) // 2, max(1, patches - 1), patches}:
        check(scores, keep)


@pytest.mark.parametrize("levels", [1, 2, 5])
def test_ties_go_to_the_lower_number(device, levels):
    scores = torch.randint(levels, (4, 100), device=device).float()
    for keep in (1, 37, 99):
        check(scores, keep)


def test_special_values(device):
    specials = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3.4e38, -3.4e38])
    scores = specials[torch.randint(len(specials), (64, 40))].to(device)
    for keep in (1, 5, 20, 39, 40):
        check(scores, keep)


def test_all_nan_and_all_minus_inf(device):
    scores = torch.stack([torch.full((9,), math.nan), torch.full((9,), -math.inf)]).to(device)
    assert select_tokens(scores, 4).tolist() == [[0, 1, 2, 3]] * 2


def test_strides(device):
    wide = torch.randn(6, 80, device=device)
    check(wide[:, 3:70], 20)  # strided rows
    check(wide[::2, ::3], 9)  # strided columns
    check(wide.t(), 5)
    check(wide[:1].expand(4, -1), 30)


def test_random_shapes(device):
    for _ in range(30):
        batch, patches = (int(torch.randint(1, high, ())) for high in (9, 700))
        keep = int(torch.randint(1, patches + 1, ()))
        check(torch.randn(batch, patches, device=device).round(decimals=2), keep)


def test_same_bits_twice(device):
    scores = torch.randn(8, 512, device=device).round(decimals=1)
    first = select_tokens(scores, 200)
    assert all(torch.equal(first, select_tokens(scores, 200)) for _ in range(5))


def test_does_not_track_gradients(device, recwarn):
    index = select_tokens(torch.randn(2, 8, device=device, requires_grad=True) * 2, 3)
    assert not index.requires_grad and not recwarn.list


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_rejects_other_dtypes(device, dtype):
    with pytest.raises(TypeError, match=f"scores: expected dtype torch.float32, got {dtype}"):
        select_tokens(torch.zeros(2, 8, device=device, dtype=dtype), 3)


def test_rejects_bad_arguments(device):
    with pytest.raises(ValueError, match=r"scores: expected shape \[B, P\], got \[8\]"):
        select_tokens(torch.zeros(8, device=device), 3)
    for keep in (0, -1, 9):
        with pytest.raises(ValueError, match=f"keep: expected 1 to 8 of 8 patches, got {keep}"):
            select_tokens(torch.zeros(2, 8, device=device), keep)
