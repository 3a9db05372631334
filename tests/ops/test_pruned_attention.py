import pytest
import torch

from pruneattn import use_backend
from pruneattn.ops import column_mean_attention, prune_tokens, pruned_attention, select_tokens
from pruneattn.ops.pruned_attention import merged, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.fixture
def check(cases):
    def check(q, k, v, x, keep, extra_tokens, scale=None):
        scores, index, x_kept, out_kept = pruned_attention(q, k, v, x, keep, extra_tokens, scale)
        exact_out, exact_scores = cases.exact_column_mean_attention(q, k, v, extra_tokens, scale)
        cases.assert_scores_close(scores, exact_scores)
        expected_index, expected_x, expected_out = prune_tokens(scores, x, merged(exact_out), keep, extra_tokens)
        assert torch.equal(index, expected_index)
        assert x_kept.dtype == x.dtype and x_kept.is_contiguous() and torch.equal(x_kept, expected_x)
        assert out_kept.dtype == q.dtype and out_kept.is_contiguous()
        cases.assert_outputs_close(out_kept, expected_out)

    return check


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extra_tokens", [0, 1, 2])
def test_equals_attention_and_prune_tokens(place, interpreted, cases, check, dtype, extra_tokens):
    for batch, heads, tokens, channels in ((1, 1, 3, 1), (2, 3, 17, 8), (3, 2, 65, 64), (1, 2, 70, 33)):
        if interpreted:  # test_column_mean_attention.py tests the attention at more sizes
            heads, tokens = 1, min(tokens, 35)
        q, k, v = cases.packed_qkv(batch, heads, tokens, channels, dtype, place)
        x, patches = torch.randn(batch, tokens, 6, device=place), tokens - extra_tokens
        for keep, scale in ((1, None), ((patches + 1) // 2, 0.1), (patches, -0.1))[-1 if interpreted else 0 :]:
            check(q, k, v, x, keep, extra_tokens, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [257, 513, 514])
def test_real_sizes(place, interpreted, cases, check, tokens, dtype):
    if interpreted and tokens != 257:
        pytest.skip("as in test_column_mean_attention.py")
    q, k, v = cases.packed_qkv(1, 1 if interpreted else 2, tokens, 64, dtype, place)
    x = torch.randn(1, tokens, 768, device=place).to(dtype)
    check(q, k, v, x, tokens // 2, tokens - 512 if tokens > 512 else 1)


def test_random_shapes_and_strides(place, interpreted, cases, check):
    for q, k, v, extra_tokens, scale in cases.random_cases(4 if interpreted else 40, place):
        x = merged(v)[:, :, ::2]  # [B, N, C]
        check(q, k, v, x, (k.shape[2] - extra_tokens + 1) // 2, extra_tokens, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_selects_like_float64(place, interpreted, cases, dtype):
    for tokens, channels in ((129, 16), (257, 64))[: 1 if interpreted else 2]:
        q, k, v = cases.packed_qkv(1 if interpreted else 4, 3, tokens, channels, dtype, place, spread=0.7)
        scores, index, *_ = pruned_attention(q, k, v, merged(v), tokens // 2, 1)
        cases.assert_selects_like_exact(scores, cases.exact_column_mean_attention(q, k, v, 1)[1], tokens // 2)
        assert torch.equal(index, select_tokens(scores, tokens // 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_go_to_the_lower_patch(place, cases, dtype):
    """With keys of zero, all scores are equal for any queries."""
    q, k, v = cases.packed_qkv(2, 2, 66, 64, dtype, place)
    scores, index, *_ = pruned_attention(q, torch.zeros_like(k), v, merged(v), 5, 2)
    assert (scores == scores[:, :1]).all()
    assert torch.equal(index, torch.arange(5, device=place).expand(2, 5))


def test_nan_ranks_first_and_stays_in_its_clip(place, cases):
    q, k, v = (t.contiguous() for t in cases.packed_qkv(2, 2, 9, 4, torch.float32, place))
    q[0, 0, 3, 0] = torch.nan
    x = torch.randn(2, 9, 4, device=place)
    results = pruned_attention(q, k, v, x, 5, 1)
    assert results[0][0].isnan().all() and not any(t[1].isnan().any() for t in results)
    assert torch.equal(results[1][0], torch.arange(5, device=place))
    with use_backend("reference"):
        expected = pruned_attention(q, k, v, x, 5, 1)
    for ours, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, wanted, equal_nan=True)


def test_same_bits_twice(place, interpreted, cases):
    size = (1, 1) if interpreted else (2, 3)
    q, k, v = cases.leaves(cases.packed_qkv(*size, 130, 16, torch.float32, place))
    x = torch.randn(size[0], 130, 4, device=place, requires_grad=True)

    def run():
        *chosen, x_kept, out_kept = pruned_attention(q, k, v, x, 60, 1)
        return *chosen, x_kept, out_kept, *torch.autograd.grad(x_kept.sum() + out_kept.sum(), (q, k, v, x))

    first = run()
    for _ in range(1 if interpreted else 3):
        assert all(map(torch.equal, first, run()))


@pytest.mark.parametrize("scale", [None, 0.7])
def test_gradients_match_the_reference(place, cases, scale):
    q, k, v = cases.leaves(cases.packed_qkv(2, 2, 9, 4, torch.float32, place))
    x = torch.randn(2, 9, 3, device=place, requires_grad=True)
    leaves = q, k, v, x

    def kept(function):
        scores, index, *results = function(q, k, v, x, 4, 2, scale)[:4]
        assert not scores.requires_grad and not index.requires_grad
        return results

    ours, expected = kept(pruned_attention), kept(reference)
    grads = [torch.randn_like(t) for t in ours]
    wanted = torch.autograd.grad(expected, leaves, grads)
    for our, want in zip(torch.autograd.grad(ours, leaves, grads), wanted, strict=True):
        torch.testing.assert_close(our, want)
    for leaf, want in zip(leaves, wanted, strict=True):  # each alone
        frozen = [t if t is leaf else t.detach() for t in leaves]
        *_, x_kept, out_kept = pruned_attention(*frozen, 4, 2, scale)
        result, grad = (x_kept, grads[0]) if leaf is x else (out_kept, grads[1])
        torch.testing.assert_close(*torch.autograd.grad(result, leaf, grad), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_any_strides(place, interpreted, cases, dtype):
    """With all patches kept, the output is that of attention, with merged heads."""

    def attend(q, k, v):
        out = pruned_attention(q, k, v, merged(v.detach()), q.shape[2] - 1, 1)[3]
        return out.unflatten(2, q.shape[1::2]).transpose(1, 2)

    cases.assert_gradients_of_any_strides(
        attend, *cases.packed_qkv(*((1, 1) if interpreted else (2, 3)), 19, 8, dtype, place)
    )


def test_gradients(any_device, cases):
    q, k, v = cases.leaves(cases.packed_qkv(2, 2, 6, 3, torch.float64, any_device))
    x = torch.randn(2, 6, 2, device=any_device, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *args: pruned_attention(*args, 3, 1)[2:], (q, k, v, x))
    *_, x_kept, out_kept = pruned_attention(q, k, v, x, 3, 1)
    grads = torch.autograd.grad(x_kept.sum(), (x, q, k, v), allow_unused=True, retain_graph=True)
    assert grads[0].sum() == 2 * 4 * 2 and grads[1:] == (None, None, None)
    grads = torch.autograd.grad(out_kept.sum(), (x, v), allow_unused=True)
    assert grads[0] is None and grads[1] is not None


def test_second_derivative_raises_an_error(any_device, cases):
    q, k, v = cases.leaves(cases.packed_qkv(1, 1, 4, 2, torch.float32, any_device))
    out_kept = pruned_attention(q, k, v, merged(v.detach()), 2, 1)[3]
    (grad,) = torch.autograd.grad(out_kept.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="once, not twice"):
        grad.sum().backward()


def test_equals_the_two_ops(place, cases):
    """Scores and output are those of column_mean_attention; only the selection is added."""
    q, k, v = cases.packed_qkv(2, 2, 35, 16, torch.float32, place)
    scores, _, _, out_kept = pruned_attention(q, k, v, merged(v), 34, 1)
    out, expected = column_mean_attention(q, k, v, 1)
    assert torch.equal(out_kept, merged(out))
    torch.testing.assert_close(scores, expected)


def test_rejects_bad_arguments(any_device):
    q, x = torch.zeros(2, 3, 9, 4, device=any_device), torch.zeros(2, 9, 5, device=any_device)
    with pytest.raises(ValueError, match=r"q: expected shape \[B, H, N, D\], got \[3, 9, 4\]"):
        pruned_attention(q[0], q, q, x, 4, 1)
    with pytest.raises(ValueError, match=r"k: expected shape \[B, H, N, D\] = \[2, 3, 9, 4\], got \[2, 3, 8, 4\]"):
        pruned_attention(q, q[:, :, 1:], q, x, 4, 1)
    with pytest.raises(TypeError, match="v: expected dtype torch.float32, the dtype of q, got torch.bfloat16"):
        pruned_attention(q, q, q.bfloat16(), x, 4, 1)
    with pytest.raises(ValueError, match=r"x: expected \[2, 1 \+ 8, C\] for q \[2, 3, 9, 4\] and .* got \[2, 8, 5\]"):
        pruned_attention(q, q, q, x[:, 1:], 4, 1)
    for keep in (0, 9):
        with pytest.raises(ValueError, match=f"keep: expected 1 to 8 of 8 patches, got {keep}"):
            pruned_attention(q, q, q, x, keep, 1)
    for extra_tokens in (-1, 9):
        with pytest.raises(ValueError, match=f"extra_tokens: expected 0 to 8 of 9 tokens, got {extra_tokens}"):
            pruned_attention(q, q, q, x, 1, extra_tokens)
