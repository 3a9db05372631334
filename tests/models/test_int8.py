"""`optimize_for_inference` with 8-bit weights, for models of this package."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pruneattn
from pruneattn import UserError, optimize_for_inference
from pruneattn.models import packed, quantize
from pruneattn.models.blocks import Linear
from pruneattn.models.packed import Int8Linear, PackedLinear, PackedQKV, quantize_linear
from pruneattn.ops.int8_linear import quantize_rows

FAMILIES = [("audiomae", 16), ("ast", 16), ("ast", 10)]
needs_int8 = pytest.mark.skipif(bool(quantize.why_not_int8()), reason="8-bit weights are slow on this machine")
ignore_warning = pytest.mark.filterwarnings("ignore:the model was optimized with dtype=torch.int8")


def layers(model):
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


def fake(x):
    q, scale = quantize_rows(x.detach())
    return q * scale.unsqueeze(-1)


class Rounded(Linear):
    """A linear layer with the rounding of 8 bits, in plain PyTorch."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features)
        self.weight.data, self.bias.data = fake(layer.weight), layer.bias.data

    def forward(self, x):
        return super().forward(fake(x))

    def project(self, x, parts, norm=None):
        x = x if norm is None else norm(x)
        first = "qkv".index(parts) * self.in_features
        return [self(x)[..., first : first + len(parts) * self.in_features]]


def with_rounding(model):
    """A copy of the model with the rounding of 8 bits, in plain PyTorch."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        block.attn.qkv, block.attn.proj = Rounded(block.attn.qkv), Rounded(block.attn.proj)
        block.mlp.fc1, block.mlp.fc2 = Rounded(block.mlp.fc1), Rounded(block.mlp.fc2)
    return model


@pytest.fixture
def float32(monkeypatch):
    """Everything but the 8-bit weights in float32."""
    monkeypatch.setattr(quantize, "float_dtype", lambda: torch.float32)


@pytest.fixture
def set_threads():
    threads = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(threads)


@needs_int8
@pytest.mark.parametrize("family, stride", FAMILIES)
@pytest.mark.parametrize("score", ["column_mean", "cls", "intensity"])
def test_result_is_that_of_rounded_weights_and_rows(make_model, float32, family, stride, score):
    model = make_model(family, stride=stride, depth=2, prune_blocks=(0,), score=score)
    fbank, rounded = torch.randn(3, 128, 128), with_rounding(model)
    fast = optimize_for_inference(copy.deepcopy(model), torch.int8)
    assert {type(layer) for layer in layers(fast)} == {Int8Linear}
    for keep_rate in (1.0, 0.5):
        for one in (model, fast, rounded):
            one.set_keep_rate(keep_rate)
        with torch.no_grad():
            truth, expected, given = model(fbank), pruneattn.trace(rounded, fbank), pruneattn.trace(fast, fbank)
        # A number near a tie may be rounded to another neighbor, and then another patch may be kept.
        same = (expected.kept[0] == given.kept[0]).all(1)  # [B]
        assert given.logits.dtype == torch.float32 and same.any()
        difference = (given.logits - expected.logits)[same].norm()
        assert 0 < difference < 0.5 * (expected.logits - truth)[same].norm()


@needs_int8
@pytest.mark.parametrize("family, stride", FAMILIES)
@pytest.mark.parametrize("keep_rate", [1.0, 0.5])
def test_same_bits_with_any_number_of_threads(make_model, set_threads, family, stride, keep_rate):
    model = make_model(family, stride=stride, keep_rate=keep_rate, depth=4, prune_blocks=(1, 2))
    fast, fbank = optimize_for_inference(model, torch.int8), torch.randn(3, 128, 128)
    results = []
    for threads in (1, 2, 1):
        set_threads(threads)
        results.append(fast(fbank))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert results[0].dtype == fast.quantization.dtype == quantize.float_dtype()


@needs_int8
@pytest.mark.parametrize("family, stride", FAMILIES)
@pytest.mark.parametrize("keep_rate", [1.0, 0.5])
def test_nan_changes_its_clip_only(make_model, family, stride, keep_rate):
    model = make_model(family, stride=stride, keep_rate=keep_rate, depth=4, prune_blocks=(1, 2))
    fast, fbank = optimize_for_inference(model, torch.int8), torch.randn(3, 128, 128)
    expected = fast(fbank)
    fbank[1, 5, 7] = torch.nan
    given = fast(fbank)
    assert given[1].isnan().all() and torch.equal(given[[0, 2]], expected[[0, 2]])


@needs_int8
def test_scores_are_float32_and_keep_rates_can_change(make_model):
    fast, fbank = optimize_for_inference(make_model("audiomae"), "auto"), torch.randn(2, 128, 128)
    dense = fast(fbank)
    fast.set_keep_rate(0.5)
    trace = pruneattn.trace(fast, fbank)
    assert fast.quantization is not None and trace.scores[0].dtype == torch.float32
    assert [kept.shape[1] for kept in trace.kept] == [32, 16, 8]
    with pruneattn.at_keep_rate(fast, 1.0):
        assert torch.equal(fast(fbank), dense) and not torch.equal(trace.logits, dense)


@needs_int8
def test_weights_take_a_quarter_of_the_memory(make_model):
    model = make_model("ast", embed_dim=192, depth=4, prune_blocks=(1,))
    before = sum(p.nbytes for block in model.blocks for p in block.parameters() if p.dim() == 2)
    optimize_for_inference(model, torch.int8)
    tensors = [*model.blocks.parameters(), *model.blocks.buffers()]
    assert sum(tensor.nbytes for tensor in tensors if tensor.dim() > 1) == before / 4
    assert all(tensor.dim() == 1 for tensor in tensors if tensor.is_floating_point())


@needs_int8
def test_weights_are_rounded_from_float32_and_norms_keep_it(make_model):
    model = make_model("audiomae", depth=2, prune_blocks=())
    weight, norm = model.blocks[1].mlp.fc2.weight.detach().clone(), model.blocks[1].norm2.weight.detach().clone()
    head = model.head.weight.detach().clone()
    fast = optimize_for_inference(model, torch.int8)
    assert torch.equal(fast.blocks[1].mlp.fc2.weight, fake(weight)) and torch.equal(fast.blocks[1].norm2.weight, norm)
    assert torch.equal(fast.head.weight, head.to(quantize.float_dtype()))


@needs_int8
def test_norms_are_part_of_the_layer_that_reads_them(make_model):
    fast = optimize_for_inference(make_model("ast", depth=4, prune_blocks=(1, 2), keep_rate=0.5), torch.int8)
    fbank, calls = torch.randn(2, 128, 128), []

    def profile():
        with torch.no_grad(), torch.profiler.profile() as profiler:
            result = fast.forward_features(fbank)
        return result, {event.key: event.count for event in profiler.key_averages()}

    expected, counts = profile()  # norms that several projections of a pruning block read are separate
    assert counts["aten::layer_norm"] == 2 and counts["pruneattn::int8_linear"] == 4 * 4 + 2 * 2
    assert "aten::gelu" not in counts and "mkldnn::_linear_pointwise" not in counts
    fast.blocks[0].norm2.register_forward_hook(lambda *_: calls.append(1))
    given, counts = profile()
    assert calls == [1] and counts["aten::layer_norm"] == 3
    assert not torch.equal(given, expected)


@needs_int8
@ignore_warning
def test_copies_pickles_and_state_dict(make_model, tmp_path):
    model, fbank = make_model("ast", keep_rate=0.5), torch.randn(2, 128, 128)
    names = list(model.state_dict())
    fast = optimize_for_inference(model, torch.int8)
    expected = fast(fbank)
    torch.save(fast, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), loaded):
        assert torch.equal(again(fbank), expected) and again.quantization == fast.quantization
        with pytest.raises(UserError, match="cannot be moved or cast"):
            again.float()
        with pytest.raises(UserError, match="accepts no new weights"):
            again.load_state_dict(fast.state_dict())
        again.set_keep_rate(1.0)
        assert torch.equal(fast(fbank), expected)
    state = fast.state_dict()
    assert list(state) == names
    plain = make_model("ast", seed=1, keep_rate=0.5)
    plain.load_state_dict(state)
    assert torch.equal(plain.blocks[3].attn.qkv.weight, fast.blocks[3].attn.qkv.weight)
    with pytest.raises(UserError, match="has no gradients"):
        fast(torch.randn(1, 128, 128, requires_grad=True))


@needs_int8
def test_a_state_dict_warns(make_model):
    fast = optimize_for_inference(make_model("audiomae", depth=2, prune_blocks=()), torch.int8)
    for module in (fast, fast.blocks[0].attn.qkv, fast.blocks[0].mlp.fc1):
        with pytest.warns(UserWarning, match="its state_dict has dequantized weights"):
            module.state_dict()


# Layers that stay in floating point -----------------------------------------------------------------------------------


@needs_int8
@pytest.mark.parametrize("calibrated", [False, True])
def test_layers_with_large_errors_stay_in_floating_point(make_model, calibrated):
    model = make_model("audiomae", embed_dim=384, num_heads=6, depth=3, prune_blocks=(1,), keep_rate=0.5)
    fbank = torch.randn(4, 128, 128)
    with torch.no_grad():
        if calibrated:  # one input channel is far larger than others, and hardly matters for the output
            model.blocks[1].norm2.bias[3] = 1e3
            model.blocks[1].mlp.fc1.weight[:, 3] = 0
        else:
            model.blocks[2].attn.proj.weight[:, 3] = 25 * 0.3
    batches = (batch for batch in (fbank[:2], (fbank[2:],), {"fbank": fbank[:1]})) if calibrated else None
    fast = optimize_for_inference(copy.deepcopy(model), torch.int8, batches)
    expected = "blocks.1.mlp.fc1" if calibrated else "blocks.2.attn.proj"
    assert [error.layer for error in fast.quantization.kept] == [expected]
    assert type(fast.get_submodule(expected)) is (
        PackedLinear if packed.can_pack(fast.head.weight) else type(model.head)
    )
    assert len(fast.quantization.errors) == 12 and fast.keep_rates == (0.5,)
    assert {error.of for error in fast.quantization.errors} == {"output" if calibrated else "weight"}
    text = str(fast.quantization)
    name = str(fast.quantization.dtype).removeprefix("torch.")
    assert text.startswith(f"8-bit weights in 11 of 12 linear layers; {name} elsewhere\n{expected} stays in {name}: ")
    limit = "output" if calibrated else "weight"
    assert f"relative error of its {limit} " in text and text.endswith(f"more than {5 if calibrated else 3}%")
    assert fast(fbank).isfinite().all()


@needs_int8
def test_measured_errors_are_those_of_the_layer(make_model):
    model, fbank = make_model("ast", depth=2, prune_blocks=()), torch.randn(2, 128, 128)
    seen = []
    handle = model.blocks[1].mlp.fc2.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        model(fbank)
    handle.remove()
    (x, output), layer = seen[0], model.blocks[1].mlp.fc2
    rounded = F.linear(fake(x), fake(layer.weight), layer.bias)
    expected = ((rounded - output).norm() / output.norm()).item()
    fast = optimize_for_inference(model, torch.int8, [fbank])
    errors = {error.layer: error for error in fast.quantization.errors}
    assert errors["blocks.1.mlp.fc2"].error == pytest.approx(expected, rel=1e-3)
    assert not any(module._forward_hooks for module in fast.modules())


@needs_int8
def test_calibration_without_usable_batches_is_rejected(make_model):
    model = make_model("ast", depth=2, prune_blocks=())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match="calibrate: no linear layer of the blocks ran"):
        optimize_for_inference(model, torch.int8, [])
    with pytest.raises(UserError, match="calibrate: the output of blocks.0.attn.qkv is not finite"):
        optimize_for_inference(model, torch.int8, [torch.full((1, 128, 128), torch.nan)])
    assert not layers(model) and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


# The choice of the precision ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["the extension is not built", ""])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float32])
def test_the_fastest_precision(make_model, monkeypatch, reason, half):
    if half == torch.bfloat16 and not packed.can_pack(torch.zeros(1, dtype=half)):
        pytest.skip("oneDNN has no bfloat16 on this machine")
    monkeypatch.setattr(quantize, "why_not_int8", lambda: reason)
    monkeypatch.setattr(quantize, "float_dtype", lambda: half)

    def make():
        return make_model("ast", depth=1, prune_blocks=())

    fast = optimize_for_inference(make(), "auto")
    assert (fast.quantization is None) == bool(reason) and fast.head.weight.dtype == half
    assert optimize_for_inference(fast, "auto") is fast and optimize_for_inference(fast) is fast
    if not reason:
        with pytest.raises(UserError, match="already packed in torch.int8"):
            optimize_for_inference(fast, torch.float32)
        return
    with pytest.warns(UserWarning, match=f"slower on this machine: the extension is not built; using {half}") as caught:
        fast = optimize_for_inference(make(), torch.int8)
    assert fast.quantization is None and fast.head.weight.dtype == half and len(caught) == 1
    assert caught[0].filename == __file__
    assert optimize_for_inference(fast, torch.int8) is fast


def test_instructions_decide(monkeypatch):
    class Compiled:
        isa = "avx512_vnni"

        def cpu_isa(self):
            return self.isa

    capabilities = {"avx512_bf16": True}
    compiled = Compiled()
    monkeypatch.setattr(quantize.backend, "_C", compiled)
    monkeypatch.setattr(quantize.backend, "why_not", lambda name: "")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(quantize, "can_pack", lambda weight: True)
    assert quantize.why_not_int8() == "" and quantize.float_dtype() == torch.bfloat16
    capabilities["amx_bf16"] = True
    assert "AMX" in quantize.why_not_int8() and quantize.float_dtype() == torch.bfloat16
    capabilities.clear()
    assert quantize.why_not_int8() == "" and quantize.float_dtype() == torch.float32
    compiled.isa = "baseline"
    assert "baseline" in quantize.why_not_int8()
    monkeypatch.setattr(quantize.backend, "why_not", lambda name: "not built")
    assert quantize.why_not_int8() == "not built"


def test_other_devices_have_no_int8(make_model):
    model = make_model("ast", depth=1, prune_blocks=()).to("meta")
    with pytest.raises(UserError, match="8-bit weights need a CPU, but the model is on meta"):
        optimize_for_inference(model, torch.int8)
    assert optimize_for_inference(model, "auto").quantization is None


# Layers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_equal_rounded_linear_layers(bias, dtype):
    linear, norm = nn.Linear(24, 36, bias), nn.LayerNorm(24, eps=1e-3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    layer = PackedLinear.of(linear, quantize_linear(linear))
    x, residual = torch.randn(2, 5, 24).to(dtype), torch.randn(2, 36, 5).transpose(1, 2).to(dtype)

    def expected(x):
        return F.linear(fake(x.float()), fake(linear.weight), linear.bias)

    close = {"rtol": 2e-2 if dtype == torch.bfloat16 else 1e-4, "atol": 1e-2 if dtype == torch.bfloat16 else 1e-5}
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected(x).to(dtype), **close)
        torch.testing.assert_close(layer.gelu(x), F.gelu(expected(x)).to(dtype), **close)
        torch.testing.assert_close(layer.add(x, residual), (residual + expected(x)).to(dtype), **close)
        torch.testing.assert_close(layer.gelu(x, norm), F.gelu(expected(norm(x.float()))).to(dtype), **close)
        torch.testing.assert_close(layer(x, norm), expected(norm(x.float())).to(dtype), **close)
        other = nn.Sequential(norm)  # is not fused
        torch.testing.assert_close(layer.gelu(x.float(), other), layer.gelu(x.float(), norm), rtol=1e-4, atol=1e-5)


def test_derived_and_incomplete_norms_are_not_fused():
    class Doubled(nn.LayerNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    linear, x = nn.Linear(24, 36), torch.randn(3, 24)
    layer = PackedLinear.of(linear, quantize_linear(linear))
    norms = [
        Doubled(24),
        nn.LayerNorm(24, bias=False),
        nn.LayerNorm((3, 24)),
        nn.LayerNorm(24, elementwise_affine=False),
    ]
    with torch.no_grad():
        for norm in norms:
            assert torch.equal(layer.gelu(x, norm), layer.gelu(norm(x)))
            assert torch.equal(layer(x, norm), layer(norm(x)))


@pytest.mark.parametrize("bias", [True, False])
def test_projections_are_split_without_rounding_again(bias):
    joint, x = nn.Linear(24, 3 * 12, bias), torch.randn(2, 5, 24)
    int8 = quantize_linear(joint)
    whole = Int8Linear(*int8)
    layer = PackedQKV.of(joint, ("qkv",), int8)
    for parts in (("q", "kv"), ("q", "k", "v"), ("qk", "v"), ("qkv",)):
        layer = PackedQKV.of(layer, parts)
        assert tuple(layer.packed) == parts and layer.kind is Int8Linear
        for given, expected in zip(layer.tensors(), int8, strict=True):
            assert given is expected is None or torch.equal(given, expected)
        assert torch.equal(layer(x), whole(x))
        norm = nn.LayerNorm(24).requires_grad_(False)
        given = torch.cat(layer.project(x, "qkv", norm), -1)
        torch.testing.assert_close(given, whole(x, norm) if parts == ("qkv",) else whole(norm(x)), rtol=0, atol=0)
        assert torch.equal(torch.cat(layer.project(x, "kv"), -1), whole(x)[..., 12:])


@needs_int8
@pytest.mark.slow
def test_compiled_models(make_model):
    torch._dynamo.reset()
    fast = optimize_for_inference(make_model("ast", keep_rate=0.5, depth=4, prune_blocks=(1,)), torch.int8)
    fbank = torch.randn(2, 128, 128)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(fast, backend="eager", fullgraph=True)(fbank), fast(fbank))
