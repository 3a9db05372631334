"""Choice of PyTorch's attention kernel on a GPU."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from pruneattn.ops import attention
from pruneattn.ops import pytorch_attention as module


@pytest.fixture
def cudnn(monkeypatch):
    """Make cuDNN's attention look fast and usable on the CPU; the scales of its calls."""
    calls = []
    is_fast, run = module._cudnn_is_fast, module._cudnn

    def pretend(q, k, v, scale):
        assert run(q.to("meta"), k.to("meta"), v.to("meta"), scale).shape == q.shape
        calls.append(scale)
        return F.scaled_dot_product_attention(q, k, v, scale=scale)

    on_cuda = torch.compiler.assume_constant_result(lambda _, index: is_fast("cuda", index))
    monkeypatch.setattr(sys.modules["pruneattn.ops.attention"], "_pytorch_is_best", lambda device_type: True)
    monkeypatch.setattr(module, "_leaves_room_for_flash_2", lambda index: True)
    monkeypatch.setattr(module, "_cudnn_is_fast", on_cuda)
    monkeypatch.setattr(module, "can_use_cudnn_attention", lambda params: True)
    monkeypatch.setattr(module, "_cudnn", pretend)
    return calls


def half(dtype=torch.bfloat16, batch=2):
    return torch.randn(batch, 9, 3, 2, 64).to(dtype).permute(2, 0, 3, 1, 4).unbind(0)  # a packed projection


def is_plain(q, k, v):
    torch.testing.assert_close(attention(q, k, v), F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cudnn_runs_half_precision(cudnn, dtype):
    q, k, v = half(dtype)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            attention(q[:, :, :5], k, v, 0.3)
    is_plain(q, k, v)
    with torch.no_grad():
        is_plain(q.detach().requires_grad_(), k, v)
    with torch.autocast("cpu", dtype):
        is_plain(q, k, v)
    assert cudnn == [0.3, 0.3, None, None, None]


def test_pytorch_chooses_where_cudnn_does_not_fit(cudnn, monkeypatch):
    q, k, v = half()
    is_plain(q.float(), k.float(), v.float())
    is_plain(q.detach().requires_grad_(), k, v)
    is_plain(q, k, v.detach().requires_grad_())
    is_plain(q[..., 1:], k[..., 1:], v[..., 1:])  # misaligned by 2 bytes
    is_plain(q, k.transpose(2, 3).contiguous().transpose(2, 3), v)  # strided channels
    is_plain(q, k[:, :1].expand_as(k), v)
    with torch.autocast("cpu", torch.float16):
        is_plain(q, k, v)
    monkeypatch.setattr(module, "can_use_cudnn_attention", lambda params: False)
    is_plain(q, k, v)
    assert cudnn == []


def test_pytorch_chooses_for_a_scale_that_is_not_positive(cudnn):
    q, k, v = half()
    for scale in (-0.3, 0.0):
        torch.testing.assert_close(attention(q, k, v, scale), F.scaled_dot_product_attention(q, k, v, scale=scale))
    assert cudnn == []


class Attend(torch.nn.Module):
    def forward(self, q, k, v):
        return attention(q, k, v, 0.3).transpose(1, 2).flatten(2)


def test_compiled_graphs_ask_cudnn_when_they_run(cudnn, monkeypatch):
    torch.compiler.reset()
    compiled = torch.compile(Attend(), fullgraph=True, backend="aot_eager")
    for batch in (2, 3, 5):
        q, k, v = half(batch=batch)
        for x in (q, k, v):
            torch._dynamo.mark_dynamic(x, 0)
        with torch._dynamo.config.patch(error_on_recompile=batch > 2):
            torch.testing.assert_close(compiled(q, k, v), Attend()(q, k, v))
    assert cudnn == [0.3] * 6
    monkeypatch.setattr(module, "can_use_cudnn_attention", lambda params: False)
    torch.testing.assert_close(compiled(q, k, v), Attend()(q, k, v))
    assert cudnn == [0.3] * 6
    # Gradients need another graph.
    q = q.detach().requires_grad_()
    ours, expected = (torch.autograd.grad(function(q, k, v).sum(), q)[0] for function in (compiled, Attend()))
    torch.testing.assert_close(ours, expected)
    assert cudnn == [0.3] * 6


def test_fake_tensors(cudnn):
    """Nothing reads the address of a fake tensor."""
    with FakeTensorMode():
        q, k, v = half()
        out = attention(q[:, :, :5], k, v)
    assert out.shape == (2, 2, 5, 64) and out.transpose(1, 2).is_contiguous()
    graph = make_fx(Attend(), tracing_mode="fake")(*half()).graph
    assert torch.ops.pruneattn.pytorch_attention.default in {node.target for node in graph.nodes} and cudnn == []


def test_compiled_by_inductor(cudnn):
    torch.compiler.reset()
    options = {"cpp.vec_isa_ok": False, "cpp_cache_precompile_headers": False, "compile_threads": 1}
    q, k, v = half()
    with torch.inference_mode():
        compiled = torch.compile(Attend(), fullgraph=True, options=options)
        torch.testing.assert_close(compiled(q, k, v), Attend()(q, k, v))
    assert cudnn == [0.3] * 2


@pytest.mark.parametrize("strict", [True, False])
def test_exported_programs_contain_pytorchs_operator(cudnn, strict):
    q, k, v = half()
    program = torch.export.export(Attend(), (q, k, v), strict=strict)
    assert "scaled_dot_product_attention" in str(program.graph) and "pruneattn" not in str(program.graph)
    assert cudnn == []


def test_the_operator(cudnn):
    q, k, v = half()
    tests = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    arguments = ((q[:, :, :5], k, v), (q, k, v, 0.3), (q[:1, :1, :1], k[:1, :1], v[:1, :1]))
    for args in (*arguments, tuple(x.float().contiguous() for x in (q, k, v))):
        torch.library.opcheck(torch.ops.pruneattn.pytorch_attention.default, args, test_utils=tests)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        torch.ops.pruneattn.pytorch_attention(q[:, :, :5], k, v)
    assert counter.get_total_flops() == 2 * 2 * 2 * 2 * 5 * 9 * 64


def test_cudnn_is_fast_on_hopper_and_blackwell(monkeypatch):
    fast = module._leaves_room_for_flash_2.__wrapped__
    for capability, expected in (((8, 0), False), ((9, 0), True), ((10, 0), True), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert fast(0) == (expected and torch.version.cuda is not None)


@pytest.mark.device
@pytest.mark.parametrize("compiled", [False, True])
def test_cudnn_on_a_gpu(cases, compiled):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    q, k, v = (t.cuda() for t in half())
    if not (module._may_be_cudnns(q, k, v, None) and module._cudnn_takes(q, k, v)):
        pytest.skip("cuDNN's attention is not the fastest on this GPU")
    torch.compiler.reset()
    function = torch.compile(attention, fullgraph=True) if compiled else attention
    with torch.inference_mode(), torch.profiler.profile(acc_events=True) as profile:
        out = function(q[:, :, :5], k, v)
    assert "aten::_scaled_dot_product_cudnn_attention" in {event.key for event in profile.key_averages()}
    cases.assert_outputs_close(out, cases.exact_attention(q[:, :, :5], k, v))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # a preference of the user
        assert not module._cudnn_takes(q, k, v)
