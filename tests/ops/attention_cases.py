"""Shared by the tests of the attention ops: inputs, their results in float64, and tolerances."""

import torch
import torch.nn.functional as F

from pruneattn.ops import select_tokens

KERNEL_DTYPES = (torch.float32, torch.bfloat16)
HEAD_SIZES = (1, 5, 8, 32, 33, 64, 80, 96, 128)
SCALES = (0.9, -0.3, 0.0)
EPS = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float64: 1e-14}
GAP = 2e-6  # scores whose relative difference is smaller may change their order


def packed_qkv(batch, heads, tokens, channels, dtype, device, spread=1.5):
    packed = torch.randn(batch, tokens, 3, heads, channels, device=device).mul(spread).to(dtype)
    return packed.permute(2, 0, 3, 1, 4).unbind(0)


def leaves(tensors):
    return [t.detach().requires_grad_() for t in tensors]


def exact_weights(q, k, scale=None):
    """The softmax matrix ``[B, H, M, N]`` in float64."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.einsum("bhmd,bhnd->bhmn", q.double(), k.double()).mul(scale).softmax(-1)


def exact_attention(q, k, v, scale=None):
    return torch.einsum("bhmn,bhnd->bhmd", exact_weights(q, k, scale), v.double())


def exact_column_mean_attention(q, k, v, extra_tokens, scale=None):
    """Paper, eq. 2a, in float64."""
    weights = exact_weights(q, k, scale)
    scores = torch.einsum("bhmn->bn", weights[:, :, extra_tokens:]) / (weights.shape[1] * (q.shape[2] - extra_tokens))
    return torch.einsum("bhmn,bhnd->bhmd", weights, v.double()), scores[:, extra_tokens:]


def exact_cls_scores(q_cls, k, extra_tokens, scale=None):
    """Paper, eq. 2b, in float64."""
    return exact_weights(q_cls.unsqueeze(2), k, scale).squeeze(2).mean(1)[:, extra_tokens:]


def assert_outputs_close(out, expected):
    eps = EPS[out.dtype]
    torch.testing.assert_close(out.double(), expected.double(), rtol=eps, atol=4 * eps, equal_nan=True)


def assert_scores_close(scores, expected):
    """Scores have float32 accuracy, for half-precision inputs, too."""
    assert scores.dtype == torch.float32 and scores.is_contiguous()
    torch.testing.assert_close(scores.double(), expected.double(), rtol=2e-5, atol=1e-9, equal_nan=True)


def assert_selects_like_exact(scores, exact_scores, keep):
    """The kept patches are those of float64, except where two scores are within ``GAP``."""
    kept = torch.zeros_like(exact_scores, dtype=torch.bool).scatter(1, select_tokens(scores, keep), True)
    lowest_kept = exact_scores.masked_fill(~kept, torch.inf).amin(1)
    highest_dropped = exact_scores.masked_fill(kept, -torch.inf).amax(1)
    assert (lowest_kept > highest_dropped * (1 - GAP)).all()


def rms(x):
    return x.double().square().mean().sqrt().item()


def assert_output_error_at_most_twice_that_of_plain(out, q, k, v):
    """The root mean square error against float64 is at most twice that of PyTorch's attention."""
    truth = exact_attention(q, k, v)
    assert rms(out - truth) <= 2 * rms(F.scaled_dot_product_attention(q, k, v) - truth)


def assert_errors_at_most_twice_those_of_plain(attend, q, k, v):
    """The errors of the output and the gradients are at most twice those of PyTorch's attention."""
    grad = torch.randn(q.shape, device=q.device).to(q.dtype)

    def results(attend, inputs, grad):
        inputs = leaves(inputs)
        out = attend(*inputs)
        return out, *torch.autograd.grad(out, inputs, grad)

    ours, plain = results(attend, (q, k, v), grad), results(F.scaled_dot_product_attention, (q, k, v), grad)
    exact = results(F.scaled_dot_product_attention, (q.double(), k.double(), v.double()), grad.double())
    for name, our, their, truth in zip(("out", "grad q", "grad k", "grad v"), ours, plain, exact, strict=True):
        assert rms(our - truth) <= 2 * rms(their - truth), name
        assert rms(our - truth) <= EPS[q.dtype] * rms(truth), name


def random_cases(count, device):
    """``(q, k, v, extra_tokens, scale)`` of random shapes, dtypes and strides.

    They are views of larger tensors with steps and offsets, contiguous tensors, tensors with strided channels, and
    expanded tensors.
    """

    def number(low, high):
        return int(torch.randint(low, high + 1, ()))

    def apart(x):
        return x.transpose(2, 3).contiguous().transpose(2, 3)

    def expanded(x):
        return x[:, :1].expand_as(x)

    for _ in range(count):
        batch, heads, channels, extra_tokens = number(1, 4), number(1, 4), number(1, 70), number(0, 2)
        tokens, step = extra_tokens + number(2, 70), number(1, 3)
        dtype = KERNEL_DTYPES[number(0, 1)]
        big = torch.randn(3, batch + 1, tokens + 2, heads * step, channels + 1, device=device).to(dtype)
        q, k, v = big[:, 1:, 2:, ::step, 1:].transpose(2, 3).unbind(0)
        change = (torch.Tensor.contiguous, apart, expanded)[number(0, 2)]
        q, k, v = (change(x) if number(0, 1) else x for x in (q, k, v))
        yield q, k, v, extra_tokens, (None, 0.2, -0.2)[number(0, 2)]


def strides_of_a_head(x):
    """``(name, view)`` of ``x`` [B, H, N, D] with strides that attention must support."""
    yield "contiguous", x.contiguous()
    yield "strided channels", x.transpose(2, 3).contiguous().transpose(2, 3)
    yield "every second channel", torch.stack([x, x + 1], -1).flatten(3)[..., ::2]
    yield "one channel for all", x[..., :1].expand_as(x)
    yield "one row for all", x[:, :, :1].expand_as(x)


def assert_gradients_of_any_strides(attend, q, k, v):
    """The gradients of ``attend(q, k, v)`` match float64 for any strides of q, k, v and the gradient of the result."""
    grad = torch.randn(q.shape, device=q.device).to(q.dtype)
    for (what, q_view), (_, k_view), (_, v_view), (_, grad_view) in zip(
        *map(strides_of_a_head, (q, k, v, grad)), strict=True
    ):
        inputs = leaves((q_view, k_view, v_view))
        exact = leaves(x.double() for x in inputs)
        ours = torch.autograd.grad(attend(*inputs), inputs, grad_view)
        expected = torch.autograd.grad(F.scaled_dot_product_attention(*exact), exact, grad_view.double())
        for name, our, truth in zip("qkv", ours, expected, strict=True):
            assert rms(our - truth) <= 2 * EPS[q.dtype] * (rms(truth) + 1), (what, name)


def special_cases(dtype, device, token, tokens):
    """``(name, [q, k, v])`` with NaN, Inf and logits too large for float32 at one token of one clip and head."""
    clean = torch.randn(3, 2, 2, tokens, 8, device=device)
    for name, place in (("q", 0), ("k", 1), ("v", 2)):
        for value in (torch.nan, torch.inf, -torch.inf, 1e10):
            if name != "v" or value != 1e10:
                changed = clean.clone()
                changed[place, 0, 0, token, 1] = value
                yield f"{name} {value}", changed.to(dtype).unbind(0)
    if device.type == "cuda" and dtype == torch.float32:
        return  # products beyond float32 have other results as 3 x TF32
    for sign in (1, -1):  # logits of +Inf and of -Inf: in one column, and in one row
        for place in (0, 1):
            changed = clean.clone()
            changed[:2, 0, 0] = changed[:2, 0, 0].abs()
            changed[place, 0, 0, token] *= sign * 1e30
            changed[1 - place, 0, 0] *= 1e30
            yield f"logits {sign * torch.inf} {place}", changed.to(dtype).unbind(0)
