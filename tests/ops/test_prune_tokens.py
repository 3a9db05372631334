import pytest
import torch

from pruneattn.ops import gather_tokens, prune_tokens, select_tokens


def check(scores, x, y, keep, extra_tokens):
    index, x_kept, y_kept = prune_tokens(scores, x, y, keep, extra_tokens)
    expected = select_tokens(scores, keep)
    assert torch.equal(index, expected)
    for kept, tokens in ((x_kept, x), (y_kept, y)):
        assert kept.dtype == tokens.dtype and kept.is_contiguous()
        assert torch.equal(kept, gather_tokens(tokens, expected, extra_tokens))


@pytest.mark.parametrize("extra_tokens", [0, 1, 2])
def test_equals_select_and_two_gathers(device, extra_tokens):
    for batch, patches, keep in ((1, 1, 1), (2, 64, 33), (3, 100, 100), (2, 512, 256), (1, 5000, 7)):
        scores = torch.randn(batch, patches, device=device).round(decimals=1)
        x = torch.randn(batch, extra_tokens + patches, 12, device=device)
        y = torch.randn(batch, extra_tokens + patches, 5, device=device, dtype=torch.bfloat16)
        check(scores, x, y, keep, extra_tokens)


def test_strides(device):
    scores, x = torch.randn(4, 40, device=device), torch.randn(4, 60, 20, device=device)
    y = torch.randn(2, 22, 12, device=device)[:, ::2, :11]
    check(scores[::2, 5:25:2], x[:2, :11, 4:9], y, 6, 1)
    expanded_clips, strided_channels = x[:1, :11].expand(2, -1, -1), y.transpose(1, 2)
    check(scores[1:, :10][:2], expanded_clips, strided_channels, 6, 1)
    check(scores[:1, :10].expand(2, -1), x[::2, 1:34:3], x[1::2, :11, ::3], 6, 1)
    check(scores[:2, ::4].t().contiguous().t(), x[:2, :11], y, 6, 1)


def test_gradients(device):
    scores = torch.randn(2, 8, device=device, requires_grad=True)
    x, y = (torch.randn(2, 9, c, device=device, dtype=torch.float64, requires_grad=True) for c in (3, 2))
    assert torch.autograd.gradcheck(lambda x, y: prune_tokens(scores, x, y, 5, 1)[1:], (x, y))
    index, _x_kept, y_kept = prune_tokens(scores, x, y, 5, 1)
    assert not index.requires_grad
    grads = torch.autograd.grad(y_kept.sum(), (x, y, scores), allow_unused=True)
    assert grads[0] is None and grads[2] is None and grads[1].sum() == 2 * 6 * 2


def test_rejects_bad_arguments(device):
    scores, x, y = (torch.zeros(shape, device=device) for shape in ((2, 8), (2, 9, 4), (2, 9, 3)))
    with pytest.raises(TypeError, match="scores: expected dtype torch.float32, got torch.bfloat16"):
        prune_tokens(scores.bfloat16(), x, y, 4, 1)
    with pytest.raises(ValueError, match="keep: expected 1 to 8 of 8 patches, got 9"):
        prune_tokens(scores, x, y, 9, 1)
    with pytest.raises(ValueError, match=r"x: expected \[2, 2 \+ 8, C\] .* got \[2, 9, 4\]"):
        prune_tokens(scores, x, y, 4, 2)
    with pytest.raises(ValueError, match=r"y: expected \[2, 1 \+ 8, C\] .* got \[2, 8, 3\]"):
        prune_tokens(scores, x, y[:, 1:], 4, 1)
    with pytest.raises(ValueError, match=r"y: expected shape \[B, N, C\], got \[9, 3\]"):
        prune_tokens(scores, x, y[0], 4, 1)
    with pytest.raises(ValueError, match="extra_tokens"):
        prune_tokens(scores, x[:, :7], y[:, :7], 4, -1)
