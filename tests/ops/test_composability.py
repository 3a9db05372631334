"""Properties of every op: opcheck, one graph under torch.compile and torch.export, autocast, FLOP counts, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from pruneattn import ops, use_backend
from pruneattn.ops import backend
from pruneattn.ops.attention import reference as attention_reference
from pruneattn.ops.int8_linear import pack_int8_weight

B, H, N, D, EXTRA = 2, 3, 10, 4, 1
NAMES = [*ops.__all__, "attention_backward"]


def packed_qkv(device, dtype=torch.float32, batch=B):
    """q, k, v as views of one tensor, as a model's projection makes them."""
    return torch.randn(batch, N, 3, H, D, device=device, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)


def arguments(name, device, requires_grad):
    def leaf(tensor):
        return tensor.detach().requires_grad_(requires_grad)

    qkv = packed_qkv(device)
    q, k, v = map(leaf, qkv)
    grad_out = torch.randn(B, H, N, D, device=device)
    scores = torch.randn(B, 2 * N, device=device)[:, 1:N]
    heads = torch.randn(B, H, 2 * N, device=device)[:, :, 1:N]
    x, y = (leaf(torch.randn(B, N, channels, device=device)) for channels in (5, 3))
    index = torch.tensor([[0, 2, 8], [3, 4, 5]], device=device)
    weight = pack_int8_weight(torch.randint(-127, 128, (3, 5), dtype=torch.int8)).to(device)
    scale, bias, residual = (torch.randn(shape, device=device) for shape in (3, 3, (B, N, 3)))
    return {
        "column_mean_attention": (q, k, v, EXTRA),
        "attention": (q[:, :, 2:7], k, v),
        "attention_backward": (grad_out, *qkv, *attention_reference(*qkv), 0.3),
        "cls_scores": (leaf(q[:, :, 0]), k, EXTRA),
        "int8_linear": (x.detach(), weight, scale, bias, residual, True),  # has no gradients
        "select_tokens": (leaf(scores), 4),
        "gather_tokens": (x, index, EXTRA),
        "prune_tokens": (scores, x, y, 4, EXTRA),
        "cls_prune_tokens": (leaf(q[:, :, 0]), k, x, y, 4, EXTRA),
        "prune_epilogue": (leaf(heads), x, y, 4, EXTRA),
        "pruned_attention": (q, k, v, x, 4, EXTRA),
    }[name]


def implementations():
    """``(name, backend, device)`` of each op and the backends that implement it and that this machine can use."""
    for name in NAMES:
        for one in backend._kernels[name]:
            devices = [backend.DEVICES[one]] if one in backend.DEVICES else ["cpu", "cuda"]
            for device in devices:
                if not backend.why_not(one) and (device == "cpu" or torch.cuda.is_available()):
                    marks = [pytest.mark.device] if device == "cuda" else []
                    marks += [pytest.mark.interpreted] if (one, device) == ("triton", "cpu") else []
                    yield pytest.param(name, one, device, marks=marks, id=f"{name}-{one}-on-{device}")


@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name, forced, device", implementations())
def test_opcheck(name, forced, device, requires_grad):
    op = getattr(torch.ops.pruneattn, name).default
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if name == "prune_tokens" and requires_grad:
        # This check adds all outputs to the first output in place, which fails for an int64 index and floats. The
        # compiled block below compares the same gradients.
        tests.remove("test_aot_dispatch_dynamic")
    with use_backend(forced):
        torch.library.opcheck(op, arguments(name, device, requires_grad), test_utils=tests)


def test_opcheck_where_a_size_is_one(any_device):
    """Fake and real tensors may have different strides for dimensions of size one."""
    for batch, heads, tokens, channels in ((1, 1, 2, 1), (1, 2, 3, 4), (2, 1, 2, 1)):
        q = torch.randn(batch, heads, tokens, channels, device=any_device)
        torch.library.opcheck(torch.ops.pruneattn.column_mean_attention.default, (q, q, q, 1))
        torch.library.opcheck(torch.ops.pruneattn.cls_scores.default, (q[:, :, 0], q, 1))
        x, scores = q.transpose(1, 2).flatten(2), torch.randn(batch, tokens - 1, device=any_device)
        torch.library.opcheck(torch.ops.pruneattn.prune_tokens.default, (scores, x, x, 1, 1))
        torch.library.opcheck(torch.ops.pruneattn.prune_epilogue.default, (scores.unsqueeze(1), x, x, 1, 1))
        torch.library.opcheck(torch.ops.pruneattn.cls_prune_tokens.default, (q[:, :, 0], q, x, x, 1, 1))
        torch.library.opcheck(torch.ops.pruneattn.pruned_attention.default, (q, q, q, x, 1, 1))


def block(qkv, weight, keep):
    """All ops, in the order of a pruning block."""
    q, k, v = qkv.unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4).unbind(0)
    out, scores = ops.column_mean_attention(q, k, v, EXTRA)
    index, x, y = ops.prune_tokens(scores, qkv, out.transpose(1, 2).flatten(2), keep, EXTRA)
    other_index = ops.select_tokens(ops.cls_scores(q[:, :, 0], k, EXTRA), keep)
    _, _, a, b = ops.cls_prune_tokens(q[:, :, 0], k, qkv, qkv.flip(2), keep, EXTRA)
    _, _, a, b = ops.prune_epilogue(scores.unsqueeze(1).expand(-1, 3, -1)[:, :, :keep], a, b, keep, EXTRA)
    _, _, c, d = ops.pruned_attention(q.flip(1), k, v, qkv, keep, EXTRA)
    a = a + c * d.repeat(1, 1, 3)
    return F.gelu(x + a * b + ops.gather_tokens(qkv, other_index, EXTRA)) @ weight, y, index


def inputs(device, batch=B):
    qkv = torch.randn(batch, N, 3 * H * D, device=device, requires_grad=True)
    return qkv, torch.randn(3 * H * D, 2, device=device, requires_grad=True)


def value_and_grads(function, qkv, weight, keep):
    first, second, index = function(qkv, weight, keep)
    return first, second, index, *torch.autograd.grad(first.sum() + second.square().sum(), (qkv, weight))


def test_compile_in_one_graph_with_a_dynamic_batch(any_device):
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for batch in (2, 3, 5):
        qkv, weight = inputs(any_device, batch)
        torch._dynamo.mark_dynamic(qkv, 0)
        with torch._dynamo.config.patch(error_on_recompile=batch > 2):
            result = value_and_grads(compiled, qkv, weight, 4)
        for ours, expected in zip(result, value_and_grads(block, qkv, weight, 4), strict=True):
            torch.testing.assert_close(ours, expected)
    with pytest.raises(Exception, match="keep: expected 1 to 9 of 9 patches, got"):
        compiled(*inputs(any_device), 10)


def test_inductor(any_device):
    torch.compiler.reset()
    # No SIMD, precompiled headers or worker processes: compiling is faster, and the ops are opaque.
    options = {"cpp.vec_isa_ok": False, "cpp_cache_precompile_headers": False, "compile_threads": 1}
    compiled = torch.compile(block, fullgraph=True, options=options)
    with torch.no_grad():
        qkv, weight = inputs(any_device)
        for ours, expected in zip(compiled(qkv, weight, 4), block(qkv, weight, 4), strict=True):
            torch.testing.assert_close(ours, expected)


class Block(torch.nn.Module):
    def forward(self, qkv, weight):
        return block(qkv, weight, 4)


def test_export_with_a_dynamic_batch(any_device, tmp_path):
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Block(), inputs(any_device), dynamic_shapes={"qkv": {0: batch}, "weight": None})
    torch.export.save(program, tmp_path / "block.pt2")
    module = torch.export.load(tmp_path / "block.pt2").module()
    for size in (1, 5):
        arguments = inputs(any_device, size)
        for ours, expected in zip(module(*arguments), Block()(*arguments), strict=True):
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_attention_and_nothing_else(any_device, dtype):
    q, k, v = (t.detach().requires_grad_() for t in packed_qkv(any_device))
    scores, x = torch.randn(B, N - 1, device=any_device), torch.randn(B, N, 6, device=any_device)
    expected_out, expected_scores = ops.column_mean_attention(q.to(dtype), k.to(dtype), v.to(dtype), EXTRA)
    with torch.autocast(any_device.type, dtype):
        out, received = ops.column_mean_attention(q, k.to(dtype), v, EXTRA)  # mixed dtypes, as SDPA supports
        class_scores = ops.cls_scores(q[:, :, 0], k, EXTRA)
        assert out.dtype == F.scaled_dot_product_attention(q, k, v).dtype == dtype
        assert ops.column_mean_attention(q.double(), k.double(), v.double(), EXTRA)[0].dtype == torch.float64
        assert ops.gather_tokens(x, ops.select_tokens(scores, 3), EXTRA).dtype == torch.float32
        assert ops.prune_tokens(scores, x, x.to(dtype), 3, EXTRA)[1].dtype == torch.float32
        chosen = ops.cls_prune_tokens(q[:, :, 0], k.to(dtype), x, x.to(dtype), 3, EXTRA)
        assert [t.dtype for t in chosen] == [torch.float32, torch.int64, torch.float32, dtype]
        assert torch.equal(chosen[2], ops.gather_tokens(x, chosen[1], EXTRA))
        assert ops.prune_epilogue(scores.unsqueeze(1), x, x.to(dtype), 3, EXTRA)[0].dtype == torch.float32
        pruned = ops.pruned_attention(q, k.to(dtype), v, x, 3, EXTRA)
        assert [t.dtype for t in pruned] == [torch.float32, torch.int64, torch.float32, dtype]
        grads = torch.autograd.grad(out.float().sum(), (q, k, v))  # the backward pass inside autocast
    assert torch.equal(out, expected_out)
    assert torch.equal(received, expected_scores)
    assert torch.equal(chosen[0], ops.cls_prune_tokens(q[:, :, 0].to(dtype), k.to(dtype), x, x, 3, EXTRA)[0])
    expected = expected_scores, *ops.prune_tokens(expected_scores, x, expected_out.transpose(1, 2).flatten(2), 3, EXTRA)
    assert all(map(torch.equal, pruned, expected))
    assert torch.equal(class_scores, ops.cls_scores(q[:, :, 0].to(dtype), k.to(dtype), EXTRA))
    out, _ = ops.column_mean_attention(q.to(dtype), k.to(dtype), v.to(dtype), EXTRA)
    outside = torch.autograd.grad(out.float().sum(), (q, k, v))
    for inside, expected in zip(grads, outside, strict=True):
        assert inside.dtype == torch.float32 and torch.equal(inside, expected)


def test_compiled_under_autocast(any_device):
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def attend(q, k, v):
        with torch.autocast(any_device.type, torch.bfloat16):
            return ops.column_mean_attention(q, k, v, EXTRA)

    q, k, v = packed_qkv(any_device)
    expected = ops.column_mean_attention(*(t.bfloat16() for t in (q, k, v)), EXTRA)
    for ours, wanted in zip(attend(q, k, v), expected, strict=True):
        assert ours.dtype == wanted.dtype and torch.equal(ours, wanted)


def test_flops_are_counted(any_device):
    q, k, v = (t.detach().requires_grad_() for t in packed_qkv(any_device))
    product = 2 * B * H * N * N * D
    with FlopCounterMode(display=False) as counter:
        out, _ = ops.column_mean_attention(q, k, v, EXTRA)
    assert counter.get_total_flops() == 2 * product
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 5 * product
    with FlopCounterMode(display=False) as counter:
        *_, kept = ops.pruned_attention(q, k, v, q[:, 0], 2, EXTRA)
    assert counter.get_total_flops() == 2 * product
    with FlopCounterMode(display=False) as counter:
        kept.sum().backward()
    assert counter.get_total_flops() == 5 * product
    with FlopCounterMode(display=False) as counter:
        ops.cls_scores(q[:, :, 0], k, EXTRA)
        ops.cls_prune_tokens(q[:, :, 0], k, q[:, 0], q[:, 1], 2, EXTRA)
    assert counter.get_total_flops() == 2 * (2 * B * H * N * D)


def test_works_on_meta_tensors():
    q = torch.empty(B, H, N, D, device="meta")
    out, scores = ops.column_mean_attention(q, q, q, EXTRA)
    assert out.shape == q.shape and scores.shape == (B, N - EXTRA) and out.device.type == "meta"
