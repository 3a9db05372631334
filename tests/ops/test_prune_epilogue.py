import pytest
import torch

from pruneattn.ops import prune_epilogue, prune_tokens


def check(partial_scores, x, y, keep, extra_tokens):
    scores, index, *kept = prune_epilogue(partial_scores, x, y, keep, extra_tokens)
    torch.testing.assert_close(scores.double(), partial_scores.double().sum(1), rtol=1e-5, atol=1e-5, equal_nan=True)
    assert scores.dtype == torch.float32 and scores.is_contiguous()
    expected_index, *expected = prune_tokens(scores, x, y, keep, extra_tokens)
    assert torch.equal(index, expected_index)
    for ours, tokens in zip(kept, expected, strict=True):
        assert ours.dtype == tokens.dtype and ours.is_contiguous() and torch.equal(ours, tokens)


@pytest.mark.parametrize("rows", [1, 2, 3, 12, 37])
def test_equals_sum_and_prune_tokens(device, rows):
    for extra_tokens, (batch, patches, keep) in enumerate(((1, 1, 1), (2, 64, 33), (2, 513, 513))):
        partial_scores = torch.rand(batch, rows, patches, device=device).round(decimals=1)
        x = torch.randn(batch, extra_tokens + patches, 12, device=device)
        y = torch.randn(batch, extra_tokens + patches, 5, device=device, dtype=torch.bfloat16)
        check(partial_scores, x, y, keep, extra_tokens)


def test_more_patches_than_the_kernel_takes(device):
    x = torch.randn(1, 5001, 3, device=device)
    check(torch.rand(1, 4, 5000, device=device), x, x, 7, 1)


def test_strides(device):
    heads, x = torch.rand(4, 6, 40, device=device), torch.randn(4, 60, 20, device=device)
    check(heads[::2, 1:4, 5:15], x[:2, :11, 4:9], x[:2, :11, ::3], 6, 1)
    check(heads[::2, ::3, 5:25:2], x[:2, :11], x[:2, 1:12], 6, 1)
    check(heads[:2, :1].expand(2, 5, 40)[:, :, 30:], x[:2, ::6], x[:2, ::6], 3, 0)


def test_nan_and_infinity_reach_the_score(device):
    partial_scores, x = torch.rand(2, 3, 9, device=device), torch.randn(2, 9, 4, device=device)
    partial_scores[0, 1, 4] = torch.nan
    partial_scores[0, 2, 7], partial_scores[1, 0, 8], partial_scores[1, 1, 8] = torch.inf, torch.inf, -torch.inf
    check(partial_scores, x, x, 2, 0)
    assert prune_epilogue(partial_scores, x, x, 2, 0)[1][0].tolist() == [4, 7]


def test_same_bits_twice(device):
    partial_scores, x = torch.rand(3, 108, 512, device=device), torch.randn(3, 513, 4, device=device)
    first = prune_epilogue(partial_scores, x, x, 100, 1)
    for _ in range(3):
        assert all(map(torch.equal, first, prune_epilogue(partial_scores, x, x, 100, 1)))


def test_results_are_not_views(device):
    """Also for one row: writing into the scores does not change the input."""
    partial_scores, x = torch.rand(2, 1, 8, device=device), torch.randn(2, 8, 4, device=device)
    before = partial_scores.clone()
    prune_epilogue(partial_scores, x, x, 8, 0)[0].zero_()
    assert torch.equal(partial_scores, before)


def test_gradients(device):
    partial_scores = torch.randn(2, 3, 8, device=device, requires_grad=True)
    x, y = (torch.randn(2, 9, c, device=device, dtype=torch.float64, requires_grad=True) for c in (3, 2))
    assert torch.autograd.gradcheck(lambda x, y: prune_epilogue(partial_scores, x, y, 5, 1)[2:], (x, y))
    scores, index, _x_kept, y_kept = prune_epilogue(partial_scores, x, y, 5, 1)
    assert not scores.requires_grad and not index.requires_grad
    grads = torch.autograd.grad(y_kept.sum(), (x, y, partial_scores), allow_unused=True)
    assert grads[0] is None and grads[2] is None and grads[1].sum() == 2 * 6 * 2


def test_rejects_bad_arguments(device):
    partial_scores, x, y = (torch.zeros(shape, device=device) for shape in ((2, 3, 8), (2, 9, 4), (2, 9, 3)))
    with pytest.raises(ValueError, match=r"partial_scores: expected shape \[B, R, P\], got \[2, 8\]"):
        prune_epilogue(partial_scores[:, 0], x, y, 4, 1)
    with pytest.raises(TypeError, match="partial_scores: expected dtype torch.float32, got torch.float16"):
        prune_epilogue(partial_scores.half(), x, y, 4, 1)
    with pytest.raises(ValueError, match=r"partial_scores: expected at least one row, got \[2, 0, 8\]"):
        prune_epilogue(partial_scores[:, :0], x, y, 4, 1)
    with pytest.raises(ValueError, match="keep: expected 1 to 8 of 8 patches, got 9"):
        prune_epilogue(partial_scores, x, y, 9, 1)
    with pytest.raises(
        ValueError, match=r"x: expected \[2, 2 \+ 8, C\] for partial_scores \[2, 3, 8\] .* got \[2, 9, 4\]"
    ):
        prune_epilogue(partial_scores, x, y, 4, 2)
    with pytest.raises(ValueError, match=r"y: expected shape \[B, N, C\], got \[9, 3\]"):
        prune_epilogue(partial_scores, x, y[0], 4, 1)
    with pytest.raises(ValueError, match="extra_tokens"):
        prune_epilogue(partial_scores, x[:, :7], y[:, :7], 4, -1)
