import pytest
import torch
import torch.nn.functional as F

from pruneattn.ops import attention
from pruneattn.ops.attention import reference as attention_reference
from pruneattn.ops.attention_backward import attention_backward

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def exact_gradients(grad_out, q, k, v, scale=None):
    """The gradients of PyTorch's attention in float64."""
    inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*inputs, scale=scale)
    return torch.autograd.grad(out, inputs, grad_out.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_values(place, cases, dtype):
    # Fewer and more queries than keys. With 300 keys, PyTorch's fused pass runs in half precision, too.
    for queries, keys, scale in ((1, 2, None), (5, 17, 0.3), (20, 7, -0.3), (3, 300, None)):
        q, k, v = (torch.randn(2, 2, n, 8, device=place).to(dtype) for n in (queries, keys, keys))
        grad_out = torch.randn(2, 2, queries, 8, device=place).to(dtype)
        out, lse = attention_reference(q, k, v, scale)
        grads = attention_backward(grad_out, q, k, v, out, lse, scale)
        for grad, x, truth in zip(grads, (q, k, v), exact_gradients(grad_out, q, k, v, scale), strict=True):
            assert grad.shape == x.shape and grad.dtype == dtype and grad.is_contiguous()
            assert cases.rms(grad - truth) <= 2 * cases.EPS[dtype] * (cases.rms(truth) + 1)


@pytest.mark.parametrize("scale", [None, -0.3, 0.0])
def test_gradients_where_queries_are_not_the_keys(place, interpreted, cases, scale):
    tokens = 100 if interpreted else 300
    inputs = cases.leaves(cases.packed_qkv(2, 2, tokens, 8, torch.float32, place))
    exact_inputs = cases.leaves(t.double() for t in inputs)
    grad = torch.randn(2, 2, 40, 8, device=place)
    q, k, v = inputs
    ours = torch.autograd.grad(attention(q[:, :, 9:49], k, v, scale), inputs, grad)
    q, k, v = exact_inputs
    expected = F.scaled_dot_product_attention(q[:, :, 9:49], k, v, scale=scale)
    for our, truth in zip(ours, torch.autograd.grad(expected, exact_inputs, grad.double()), strict=True):
        torch.testing.assert_close(our.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype, tokens", [(torch.float32, 21), (torch.bfloat16, 21), (torch.bfloat16, 259)])
def test_gradients_of_any_strides(place, interpreted, cases, dtype, tokens):
    sizes = (1, 1, min(tokens, 35), 8) if interpreted else (2, 2, tokens, 8)
    cases.assert_gradients_of_any_strides(attention, *cases.packed_qkv(*sizes, dtype, place))


def test_gradient_reaches_one_input_alone(place, cases):
    q, k, v = cases.packed_qkv(1, 2, 5, 3, torch.float32, place)
    v = v.detach().requires_grad_()
    (grad,) = torch.autograd.grad(attention(q, k, v).sum(), v)
    torch.testing.assert_close(grad.sum(), torch.tensor(float(grad.numel()), device=place))


def test_second_derivative_raises_an_error(cases):
    q, k, v = cases.leaves(cases.packed_qkv(1, 1, 4, 2, torch.float32, "cpu"))
    (grad,) = torch.autograd.grad(attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="once, not twice"):
        grad.sum().backward()


def test_rejects_bad_arguments(any_device):
    q = torch.zeros(2, 3, 9, 4, device=any_device)
    lse = torch.zeros(2, 3, 9, device=any_device)
    with pytest.raises(
        ValueError, match=r"grad_out: expected shape \[B, H, M, D\] = \[2, 3, 9, 4\], got \[2, 3, 8, 4\]"
    ):
        attention_backward(q[:, :, 1:], q, q, q, q, lse)
    with pytest.raises(TypeError, match="grad_out: expected dtype torch.float32, the dtype of q, got torch.float16"):
        attention_backward(q.half(), q, q, q, q, lse)
    with pytest.raises(ValueError, match=r"v: expected shape .* got \[2, 3, 8, 4\]"):
        attention_backward(q, q, q, q[:, :, 1:], q, lse)
