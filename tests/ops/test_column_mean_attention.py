import pytest
import torch
import torch.nn.functional as F

from pruneattn.ops import column_mean_attention, select_tokens
from pruneattn.ops.column_mean_attention import reference

EPS = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float64: 1e-14}


def exact(q, k, v, extra_tokens, scale=None):
    """Paper, eq. 2a, in float64, one query row after the other."""
    q, k, v = q.double(), k.double(), v.double()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    heads, tokens = q.shape[1:3]
    out, scores = torch.empty_like(q), 0
    for row in range(tokens):
        attention = torch.einsum("bhd,bhnd->bhn", q[:, :, row], k).mul(scale).softmax(-1)
        out[:, :, row] = torch.einsum("bhn,bhnd->bhd", attention, v)
        if row >= extra_tokens:
            scores = scores + attention.sum(1)[:, extra_tokens:] / (heads * (tokens - extra_tokens))
    return out, scores


def packed_qkv(batch, heads, tokens, channels, dtype, device, spread=1.5):
    packed = torch.randn(batch, tokens, 3, heads, channels, device=device).mul(spread).to(dtype)
    return packed.permute(2, 0, 3, 1, 4).unbind(0)


def rms(x):
    return x.double().square().mean().sqrt().item()


def check(q, k, v, extra_tokens, scale=None):
    out, scores = column_mean_attention(q, k, v, extra_tokens, scale)
    expected_out, expected_scores = exact(q, k, v, extra_tokens, scale)
    assert out.dtype == q.dtype and scores.dtype == torch.float32
    assert out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out.double(), expected_out, rtol=EPS[q.dtype], atol=4 * EPS[q.dtype])
    # float32 accuracy for half-precision inputs, too
    torch.testing.assert_close(scores.double(), expected_scores, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("extra_tokens", [0, 1, 2])
def test_values(any_device, dtype, extra_tokens):
    for batch, heads, tokens, channels in ((1, 1, 3, 1), (2, 3, 17, 8), (3, 2, 65, 64), (1, 2, 70, 33)):
        check(*packed_qkv(batch, heads, tokens, channels, dtype, any_device), extra_tokens)


def test_every_small_size(any_device):
    for tokens in range(2, 40):
        check(*packed_qkv(1, 2, tokens, 5, torch.float32, any_device), tokens % 2)


@pytest.mark.parametrize("tokens", [257, 513, 514])
def test_real_sizes(any_device, tokens):
    check(*packed_qkv(1, 2, tokens, 64, torch.float32, any_device), tokens - 512 if tokens > 512 else 1)


def test_scale(any_device):
    q, k, v = packed_qkv(2, 2, 9, 4, torch.float32, any_device)
    check(q, k, v, 1, 0.9)
    assert not torch.equal(column_mean_attention(q, k, v, 1, 0.9)[1], column_mean_attention(q, k, v, 1)[1])


def test_scores_add_up_to_what_patches_do_not_give_to_extra_tokens(any_device):
    q, k, v = packed_qkv(2, 3, 20, 8, torch.float32, any_device)
    torch.testing.assert_close(column_mean_attention(q, k, v, 0)[1].sum(1), torch.ones(2, device=any_device))
    assert (column_mean_attention(q, k, v, 2)[1].sum(1) < 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [65, 257])
def test_error_is_at_most_twice_that_of_plain_attention(any_device, dtype, tokens):
    """Forward and backward, against float64, in the root mean square."""
    q, k, v = (t.detach().requires_grad_() for t in packed_qkv(2, 3, tokens, 64, dtype, any_device))
    grad = torch.randn(q.shape, device=any_device).to(dtype)
    exact_inputs = [t.detach().double().requires_grad_() for t in (q, k, v)]
    expected = F.scaled_dot_product_attention(*exact_inputs)
    expected = (expected, *torch.autograd.grad(expected, exact_inputs, grad.double()))

    plain = F.scaled_dot_product_attention(q, k, v)
    plain = (plain, *torch.autograd.grad(plain, (q, k, v), grad))
    ours = column_mean_attention(q, k, v, 1)[0]
    ours = (ours, *torch.autograd.grad(ours, (q, k, v), grad))
    for name, our, their, truth in zip(("out", "grad q", "grad k", "grad v"), ours, plain, expected):
        assert rms(our - truth) <= 2 * rms(their - truth), name
        assert rms(our - truth) <= EPS[dtype] * rms(truth), name


def test_half_precision_selects_like_float64(any_device):
    """The selected set is the exact one but for scores that differ by less than 2e-6 of their size."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        q, k, v = packed_qkv(4, 3, 129, 16, dtype, any_device, spread=0.7)
        scores = column_mean_attention(q, k, v, 1)[1]
        truth = exact(q, k, v, 1)[1]
        index = select_tokens(scores, 64)
        kept = torch.zeros_like(truth, dtype=torch.bool).scatter(1, index, True)
        lowest_kept = truth.masked_fill(~kept, torch.inf).amin(1)
        highest_dropped = truth.masked_fill(kept, -torch.inf).amax(1)
        assert (lowest_kept > highest_dropped * (1 - 2e-6)).all()


def test_random_shapes_and_strides(any_device):
    for _ in range(25):
        batch, heads, channels = (int(torch.randint(1, 5, ())) for _ in range(3))
        extra_tokens = int(torch.randint(3, ()))
        tokens = extra_tokens + int(torch.randint(1, 30, ()))
        dtype = (torch.float32, torch.bfloat16)[int(torch.randint(2, ()))]
        big = torch.randn(3, batch + 1, tokens + 2, heads * 2, channels + 1, device=any_device).to(dtype)
        q, k, v = big[:, 1:, 2:, ::2, 1:].transpose(2, 3).unbind(0)
        check(q, k, v.contiguous(), extra_tokens)
        check(q, k.transpose(2, 3).contiguous().transpose(2, 3), v, extra_tokens)  # channels apart


def test_same_bits_twice(any_device):
    q, k, v = (t.detach().requires_grad_() for t in packed_qkv(2, 3, 130, 16, torch.float32, any_device))

    def run():
        out, scores = column_mean_attention(q, k, v, 1)
        return out, scores, *torch.autograd.grad(out.sum(), (q, k, v))

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run()))


def test_nan_reaches_the_score(any_device):
    q, k, v = (t.contiguous() for t in packed_qkv(2, 2, 6, 4, torch.float32, any_device))
    q[0, 0, 3, 0] = torch.nan
    out, scores = column_mean_attention(q, k, v, 1)
    assert scores[0].isnan().all() and not scores[1].isnan().any()
    assert out[0, 0, 3].isnan().all() and not out[0, 0, :3].isnan().any()


def test_gradients(any_device):
    q, k, v = (
        t.detach().requires_grad_() for t in packed_qkv(2, 2, 5, 3, torch.float64, any_device)
    )
    assert torch.autograd.gradcheck(lambda *qkv: column_mean_attention(*qkv, 1)[0], (q, k, v))
    assert torch.autograd.gradcheck(lambda *qkv: column_mean_attention(*qkv, 1, 0.7)[0], (q, k, v))
    # The definition is differentiable by itself, and has the same gradient.
    out, scores = column_mean_attention(q, k, v, 1)
    assert not scores.requires_grad
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, (q, k, v), grad)
    for our, expected in zip(ours, torch.autograd.grad(reference(q, k, v, 1)[0], (q, k, v), grad)):
        torch.testing.assert_close(our, expected)


def test_gradient_reaches_one_input_alone(any_device):
    q, k, v = packed_qkv(1, 2, 5, 3, torch.float32, any_device)
    v = v.detach().requires_grad_()
    (grad,) = torch.autograd.grad(column_mean_attention(q, k, v, 1)[0].sum(), v)
    torch.testing.assert_close(grad.sum(), torch.tensor(float(grad.numel()), device=any_device))


def test_second_derivative_is_refused(any_device):
    q, k, v = (t.detach().requires_grad_() for t in packed_qkv(1, 1, 4, 2, torch.float32, any_device))
    (grad,) = torch.autograd.grad(column_mean_attention(q, k, v, 1)[0].square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="once, not twice"):
        grad.sum().backward()


def test_refuses_bad_arguments(any_device):
    q = torch.zeros(2, 3, 9, 4, device=any_device)
    with pytest.raises(ValueError, match=r"q: expected shape \[B, H, N, D\], got \[3, 9, 4\]"):
        column_mean_attention(q[0], q[0], q[0], 1)
    with pytest.raises(ValueError, match=r"k: expected shape \[B, H, N, D\] = \[2, 3, 9, 4\], got \[2, 3, 8, 4\]"):
        column_mean_attention(q, q[:, :, 1:], q, 1)
    with pytest.raises(ValueError, match=r"v: expected shape .* got \[1, 3, 9, 4\]"):
        column_mean_attention(q, q, q[:1], 1)
    with pytest.raises(TypeError, match="v: expected dtype torch.float32, the dtype of q, got torch.bfloat16"):
        column_mean_attention(q, q, q.bfloat16(), 1)
    with pytest.raises(TypeError, match="q: expected dtype torch.float32 or .* got torch.int64"):
        column_mean_attention(q.long(), q.long(), q.long(), 1)
    for extra_tokens in (-1, 9):
        with pytest.raises(ValueError, match=f"extra_tokens: expected 0 to 8 of 9 tokens, got {extra_tokens}"):
            column_mean_attention(q, q, q, extra_tokens)
