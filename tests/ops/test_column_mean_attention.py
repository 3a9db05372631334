import pytest
import torch

from pruneattn import backends, use_backend
from pruneattn.ops import column_mean_attention
from pruneattn.ops.column_mean_attention import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.fixture
def check(cases):
    def check(q, k, v, extra_tokens, scale=None):
        out, scores = column_mean_attention(q, k, v, extra_tokens, scale)
        expected_out, expected_scores = cases.exact_column_mean_attention(q, k, v, extra_tokens, scale)
        assert out.dtype == q.dtype and out.transpose(1, 2).is_contiguous()
        cases.assert_outputs_close(out, expected_out)
        cases.assert_scores_close(scores, expected_scores)

    return check


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extra_tokens", [0, 1, 2])
def test_values(place, cases, check, dtype, extra_tokens):
    for batch, heads, tokens, channels in ((1, 1, 3, 1), (2, 3, 17, 8), (3, 2, 65, 64), (1, 2, 70, 33)):
        check(*cases.packed_qkv(batch, heads, tokens, channels, dtype, place), extra_tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_small_size(place, interpreted, cases, check, dtype):
    for tokens in range(2, 41, 5 if interpreted else 1):
        for extra_tokens in range(min(3, tokens)):
            check(*cases.packed_qkv(1, 1 if interpreted else 2, tokens, 5, dtype, place), extra_tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [257, 513, 514])
def test_real_sizes(place, interpreted, cases, check, tokens, dtype):
    check(*cases.packed_qkv(1, 1 if interpreted else 2, tokens, 64, dtype, place), tokens - 512 if tokens > 512 else 1)


def test_many_tokens(cpu_kernels, cases):
    q, k, v = cases.packed_qkv(1, 1, 4096, 16, torch.float32, cpu_kernels)
    out, scores = column_mean_attention(q, k, v, 2)
    rows = q.split(256, 2)  # the float64 matrix in parts
    sums = sum(torch.einsum("bhmn->bn", cases.exact_weights(part, k)) for part in rows)
    sums -= torch.einsum("bhmn->bn", cases.exact_weights(q[:, :, :2], k))
    cases.assert_scores_close(scores, sums[:, 2:] / 4094)
    cases.assert_output_error_at_most_twice_that_of_plain(out[:, :, ::16], q[:, :, ::16], k, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_sizes(place, interpreted, cases, check, dtype):
    for channels in cases.HEAD_SIZES:
        for extra_tokens in (1,) if interpreted else (0, 1, 2):
            check(*cases.packed_qkv(1, 2, 35, channels, dtype, place), extra_tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale(place, cases, check, dtype):
    for tokens in (9, 16, 21):
        q, k, v = cases.packed_qkv(2, 2, tokens, 4, dtype, place)
        for scale in cases.SCALES:
            check(q, k, v, 1, scale)
    assert not torch.equal(column_mean_attention(q, k, v, 1, 0.9)[1], column_mean_attention(q, k, v, 1)[1])


def test_scores_add_up_to_one_minus_the_attention_to_extra_tokens(place, cases):
    q, k, v = cases.packed_qkv(2, 3, 20, 8, torch.float32, place)
    torch.testing.assert_close(column_mean_attention(q, k, v, 0)[1].sum(1), torch.ones(2, device=place))
    assert (column_mean_attention(q, k, v, 2)[1].sum(1) < 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [65, 257])
def test_error_is_at_most_twice_that_of_plain_attention(place, interpreted, cases, dtype, tokens):
    q, k, v = cases.packed_qkv(2, 1 if interpreted else 3, tokens, 64, dtype, place)
    cases.assert_errors_at_most_twice_those_of_plain(lambda *qkv: column_mean_attention(*qkv, 1)[0], q, k, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_selects_like_float64(place, interpreted, cases, dtype):
    for tokens, channels in ((129, 16), (257, 64)):
        q, k, v = cases.packed_qkv(1 if interpreted else 4, 3, tokens, channels, dtype, place, spread=0.7)
        scores, truth = column_mean_attention(q, k, v, 1)[1], cases.exact_column_mean_attention(q, k, v, 1)[1]
        for keep in (1, tokens // 2, tokens - 10):
            cases.assert_selects_like_exact(scores, truth, keep)


def test_random_shapes_and_strides(place, interpreted, cases, check):
    for q, k, v, extra_tokens, scale in cases.random_cases(8 if interpreted else 40, place):
        check(q, k, v, extra_tokens, scale)


def test_same_bits_twice(place, interpreted, cases):
    q, k, v = cases.leaves(
        cases.packed_qkv(1 if interpreted else 2, 1 if interpreted else 3, 130, 16, torch.float32, place)
    )

    def run():
        out, scores = column_mean_attention(q, k, v, 1)
        return out, scores, *torch.autograd.grad(out.sum(), (q, k, v))

    first = run()
    for _ in range(1 if interpreted else 3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_nan_reaches_the_score(place, cases):
    q, k, v = (t.contiguous() for t in cases.packed_qkv(2, 2, 6, 4, torch.float32, place))
    q[0, 0, 3, 0] = torch.nan
    out, scores = column_mean_attention(q, k, v, 1)
    assert scores[0].isnan().all() and not scores[1].isnan().any()
    assert out[0, 0, 3].isnan().all() and not out[0, 0, :3].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_special_values_match_the_reference(kernels, interpreted, cases, dtype):
    for tokens in (34,) if interpreted else (6, 20, 37):
        places = (0, 1, None), (2, 2, -0.3), (tokens - 1, 0, 0.4)
        for number, (token, extra_tokens, scale) in enumerate(places):
            # The interpreter runs each value in one place, the compiled kernels in all places.
            part = slice(number, None, 3) if interpreted else slice(None)
            for what, (q, k, v) in list(cases.special_cases(dtype, kernels, token, tokens))[part]:
                out, scores = column_mean_attention(q, k, v, extra_tokens, scale)
                with use_backend("reference"):
                    expected_out, expected_scores = column_mean_attention(q, k, v, extra_tokens, scale)
                assert torch.equal(out.isnan(), expected_out.isnan()), (what, token, tokens)
                assert torch.equal(scores.isnan(), expected_scores.isnan()), (what, token, tokens)
                cases.assert_outputs_close(out, expected_out)
                if "logits" in what and backends().forced == "triton":
                    # The kernels compute logits twice, and the rounding error of logits of 1e30 exceeds any score.
                    assert (scores <= 1).logical_or(scores.isnan()).all(), (what, token, tokens)
                else:
                    cases.assert_scores_close(scores, expected_scores)


def test_gradients(any_device, cases):
    q, k, v = cases.leaves(cases.packed_qkv(2, 2, 5, 3, torch.float64, any_device))
    assert torch.autograd.gradcheck(lambda *qkv: column_mean_attention(*qkv, 1)[0], (q, k, v))
    assert torch.autograd.gradcheck(lambda *qkv: column_mean_attention(*qkv, 1, 0.7)[0], (q, k, v))
    # Autograd differentiates the reference, too, with the same gradients.
    out, scores = column_mean_attention(q, k, v, 1)
    assert not scores.requires_grad
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, (q, k, v), grad)
    for our, expected in zip(ours, torch.autograd.grad(reference(q, k, v, 1)[0], (q, k, v), grad), strict=True):
        torch.testing.assert_close(our, expected)


def test_gradient_reaches_one_input_alone(place, cases):
    q, k, v = cases.packed_qkv(1, 2, 5, 3, torch.float32, place)
    v = v.detach().requires_grad_()
    (grad,) = torch.autograd.grad(column_mean_attention(q, k, v, 1)[0].sum(), v)
    torch.testing.assert_close(grad.sum(), torch.tensor(float(grad.numel()), device=place))


def test_second_derivative_raises_an_error(any_device, cases):
    q, k, v = cases.leaves(cases.packed_qkv(1, 1, 4, 2, torch.float32, any_device))
    (grad,) = torch.autograd.grad(column_mean_attention(q, k, v, 1)[0].square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="once, not twice"):
        grad.sum().backward()


def test_rejects_bad_arguments(any_device):
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
