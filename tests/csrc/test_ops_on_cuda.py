"""The ops' CUDA functions on CPU tensors, with emulated CUDA kernels."""

import sys

import pytest
import torch

import pruneattn.ops  # noqa: F401
from pruneattn.ops import backend

MODULES = ("cls_scores", "column_mean_attention", "gather_tokens", "prune_epilogue", "prune_tokens", "select_tokens")
EPS = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture
def launched(emulated_module, monkeypatch):
    """The names of the launched kernels."""
    names = []

    def launch(kernel, tensor, *args):
        names.append(kernel)
        getattr(emulated_module, f"cuda_{kernel}")(*args, 0, 0)

    for name in MODULES:
        monkeypatch.setattr(sys.modules[f"pruneattn.ops.{name}"], "launch", launch)
        monkeypatch.setattr(sys.modules[f"pruneattn.ops.{name}"], "_C", emulated_module)
    functions = backend._kernels["prune_epilogue"]
    for name in ("cls_prune_tokens", "pruned_attention"):
        monkeypatch.setattr(sys.modules[f"pruneattn.ops.{name}"], "choose", lambda op, device: functions["cuda"])
    # This function caches the limit of a device: here, of the emulated device.
    most_tokens = sys.modules["pruneattn.ops.column_mean_attention"]._most_tokens
    most_tokens.cache_clear()
    yield names
    most_tokens.cache_clear()


def check(name, *args):
    """Check that the op's CUDA function and its reference have equal results."""
    functions = backend._kernels[name]
    ours, expected = functions["cuda"](*args), functions["reference"](*args)
    for one, other in zip(*((t,) if torch.is_tensor(t) else t for t in (ours, expected)), strict=True):
        assert one.is_contiguous() or (name == "column_mean_attention" and one.transpose(1, 2).is_contiguous())
        eps = EPS.get(one.dtype, 0)
        torch.testing.assert_close(one, other, rtol=eps, atol=4 * eps if one.dtype.itemsize == 2 else 1e-7)


def tokens_of(batch, tokens):
    return torch.randn(batch, tokens, 12), torch.randn(batch, tokens, 5, dtype=torch.bfloat16)[:, :, ::2]


def test_select_and_gather(launched):
    scores, (x, y) = torch.randn(2, 40), tokens_of(2, 42)
    check("select_tokens", scores[:, ::2], 7)
    check("gather_tokens", x, torch.tensor([[0, 3], [39, 5]]), 2)
    check("prune_tokens", scores, x, y, 30, 2)
    assert launched == ["select_tokens", "gather_tokens", "prune_tokens"]


@pytest.mark.parametrize("rows", [1, 12])
def test_prune_epilogue(launched, rows):
    x, y = tokens_of(2, 71)
    check("prune_epilogue", torch.rand(2, rows, 70), x, y, 33, 1)
    check("prune_epilogue", torch.rand(4, 2 * rows, 90)[1:3, ::2, 20:], x, y, 70, 1)
    check("prune_epilogue", torch.rand(2, rows, 140)[:, :, ::2], x, y, 1, 1)
    assert launched == ["prune_epilogue"] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cls_scores(launched, dtype):
    packed = torch.randn(2, 66, 3, 4, 16).to(dtype)  # [B, N, 3, H, D]
    q, k, _ = packed.permute(2, 0, 3, 1, 4).unbind(0)
    for scale in (None, -0.3):
        check("cls_scores", q[:, :, 0], k, 2, scale)
        check("cls_prune_tokens", q[:, :, 0], k, *tokens_of(2, 66), 20, 2, scale)
    check("cls_scores", q[:, :, 0, ::2], k[..., ::2], 0)
    assert launched == ["cls_scores", "cls_scores", "prune_epilogue"] * 2 + ["cls_scores"]


def attention_input(batch, heads, tokens, dtype):
    packed = torch.randn(batch, tokens, 3, heads, 64).to(dtype)
    return packed.permute(2, 0, 3, 1, 4).unbind(0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_with_column_means(launched, dtype):
    for tokens, extra_tokens, scale in ((17, 0, None), (65, 1, 0.2), (130, 2, None)):
        q, k, v = attention_input(2, 2, tokens, dtype)
        check("column_mean_attention", q, k, v, extra_tokens, scale)
        x = torch.randn(2, tokens, 12)
        for keep in (1, (tokens - extra_tokens) // 2, tokens - extra_tokens):
            check_pruned(q, k, v, x, keep, extra_tokens, scale)
    assert launched == (["column_mean_attention"] + ["column_mean_attention", "prune_epilogue"] * 3) * 3


def check_pruned(q, k, v, x, keep, extra_tokens, scale=None):
    """Check the scores of pruned_attention's CUDA function, and that it prunes by these scores."""
    functions = backend._kernels["pruned_attention"]
    scores, index, x_kept, out_kept, out, lse = functions["cuda"](q, k, v, x, keep, extra_tokens, scale)
    expected, *_, expected_out, expected_lse = functions["reference"](q, k, v, x, keep, extra_tokens, scale)
    for one, other in zip((scores, lse, out), (expected, expected_lse, expected_out)):
        eps = EPS[one.dtype]
        torch.testing.assert_close(one, other, rtol=eps, atol=4 * eps if one.dtype.itemsize == 2 else eps)
    rows = out.transpose(1, 2).flatten(2)
    wanted = backend._kernels["prune_tokens"]["reference"](scores, x, rows, keep, extra_tokens)
    for one, other in zip((index, x_kept, out_kept), wanted):
        assert one.is_contiguous() and torch.equal(one, other)


def test_attention_of_inputs_without_16_byte_alignment(launched):
    q, k, v = attention_input(2, 2, 33, torch.bfloat16)

    def run(*qkv):
        return backend._kernels["column_mean_attention"]["cuda"](*qkv, 1)

    def moved(x):
        """A copy that starts two bytes off alignment."""
        return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)

    def odd(x):
        """A copy with rows of 67 elements."""
        return torch.empty(*x.shape[:3], 67, dtype=x.dtype)[..., :64].copy_(x)

    def apart(x):
        """A copy in every other channel of a larger tensor."""
        return torch.empty(*x.shape[:3], 128, dtype=x.dtype)[..., ::2].copy_(x)

    expected = run(q, k, v)
    for change in (moved, odd, apart):
        for inputs in ((change(q), k, v), (q, change(k), v), (q, k, change(v)), tuple(map(change, (q, k, v)))):
            assert all(map(torch.equal, run(*inputs), expected))
    assert launched == ["column_mean_attention"] * 13


def test_unsupported_attention_inputs_run_the_reference(launched, monkeypatch):
    # Otherwise Triton's kernel would run, in the interpreter.
    monkeypatch.setattr(
        sys.modules["pruneattn.ops.column_mean_attention"], "stands_in", lambda name, device_type: False
    )

    def both(q, k, v, scale=None):
        check("column_mean_attention", q, k, v, 1, scale)
        check_pruned(q, k, v, torch.randn(1, q.shape[2], 4), 3, 1, scale)

    q, k, v = attention_input(1, 1, 9, torch.bfloat16)
    both(q.float(), k.float(), v.float())
    both(q[..., :32], k[..., :32], v[..., :32])
    both(q, k, v, -0.2)
    both(q, k, v, 0.0)
    both(*attention_input(1, 1, 577, torch.bfloat16))
    assert launched == ["prune_epilogue"] * 5


def test_triton_replaces_the_cuda_kernel_for_unsupported_inputs(launched, monkeypatch):
    module = sys.modules["pruneattn.ops.column_mean_attention"]
    monkeypatch.setattr(module, "stands_in", lambda name, device_type: name == "triton")
    monkeypatch.setattr(module, "triton_partials", lambda q, *args: ("by", "triton", q))
    q, k, v = attention_input(1, 1, 9, torch.float32)
    assert module.cuda_partials(q, k, v, 1) == ("by", "triton", q)
    assert launched == []


def test_unsupported_inputs_run_the_reference(launched):
    q, x = torch.randn(2, 2, 9, 4), tokens_of(2, 9)
    check("cls_scores", q[:, :, 0].double(), q.double(), 1)
    check("cls_prune_tokens", q[:, :, 0].double(), q.double(), *x, 3, 1)
    assert launched == ["prune_epilogue"]
    long = torch.randn(1, 1, 5000, 4)
    check("cls_scores", long[:, :, 0], long, 1)
    check("cls_prune_tokens", long[:, :, 0], long, *tokens_of(1, 5000), 3, 1)
    check("prune_epilogue", torch.randn(1, 2, 5000), *tokens_of(1, 5000), 3, 0)
    assert launched == ["prune_epilogue"]
