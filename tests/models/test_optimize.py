import copy

import pytest
import torch
import torch.nn.functional as F

import pruneattn
from pruneattn import UserError, optimize_for_inference
from pruneattn.models import optimize
from pruneattn.models.optimize import PackedLinear, PackedQKV, can_pack

FAMILIES = ["audiomae", "ast"]
SCORES = ["column_mean", "cls", "intensity", "variation", "random"]
SCORES.append(lambda q, k, v, extra: k.square().mean((1, 3))[:, extra:])

pytestmark = pytest.mark.skipif(not can_pack(torch.zeros(1, 1)), reason="this PyTorch has no oneDNN")
needs_bf16 = pytest.mark.skipif(
    not can_pack(torch.zeros(1, 1, dtype=torch.bfloat16)), reason="oneDNN has no bfloat16 on this machine"
)


def packed(model):
    return [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("score", SCORES, ids=[*SCORES[:-1], "function"])
def test_same_result_at_any_keep_rate(make_model, family, score):
    model, fbank = make_model(family, score=score), torch.randn(3, 128, 128)
    fast = optimize_for_inference(copy.deepcopy(model))
    assert len(packed(fast)) == (4 * 10 if score in ("column_mean", SCORES[-1]) else 4 * 10 + 3)
    for keep_rate in (1.0, 0.7, (0.9, 1.0, 0.3)):
        model.set_keep_rate(keep_rate)
        fast.set_keep_rate(keep_rate)
        with torch.no_grad():
            torch.testing.assert_close(fast(fbank), model(fbank), rtol=1e-4, atol=1e-5)
        ours, expected = pruneattn.trace(fast, fbank), pruneattn.trace(model, fbank)
        assert all(torch.equal(a, b) for a, b in zip(ours.kept, expected.kept, strict=True))
        torch.testing.assert_close(ours.scores, expected.scores, rtol=1e-4, atol=1e-6)


@needs_bf16
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(make_model, family):
    """As close to float32 as the same model cast to bfloat16 without packing."""
    model, fbank = make_model(family), torch.randn(4, 128, 128)
    cast = copy.deepcopy(model).bfloat16()
    fast = optimize_for_inference(copy.deepcopy(model), torch.bfloat16)
    with torch.no_grad():
        truth = model(fbank)
        error = (fast(fbank) - truth).square().mean().sqrt()
        assert error <= 1.5 * (cast(fbank) - truth).square().mean().sqrt()
    fast.set_keep_rate(0.5)
    trace = pruneattn.trace(fast, fbank)
    assert trace.logits.dtype == torch.bfloat16 and trace.scores[0].dtype == torch.float32


def test_every_block_runs_our_attention_and_oneDNN(make_model, monkeypatch):
    fast = optimize_for_inference(make_model("audiomae", keep_rate=0.5))
    monkeypatch.setattr(F, "linear", None)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    with torch.no_grad(), torch.profiler.profile() as profile:
        fast.forward_features(torch.randn(2, 128, 128))
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["pruneattn::attention"] == 7 and calls["pruneattn::pruned_attention"] == 3
    assert calls["mkldnn::_linear_pointwise"] == 4 * 10
    assert "aten::gelu" not in calls and "aten::linear" not in calls


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_can_still_be_saved(make_model, family, tmp_path):
    model = make_model(family, keep_rate=0.6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast = optimize_for_inference(model)
    after = fast.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    fbank = torch.randn(2, 128, 128)
    torch.save(fast, tmp_path / "model.pt")
    for again in (copy.deepcopy(fast), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert packed(again) == packed(fast)
        assert torch.equal(again(fbank), fast(fbank))
    plain = make_model(family, seed=1, keep_rate=0.6)
    plain.load_state_dict(after)
    torch.testing.assert_close(plain(fbank), fast(fbank), rtol=1e-4, atol=1e-5)


def test_saved_and_loaded_again(make_model, tmp_path):
    from pruneattn.data.fbank import FeatureConfig

    fast, fbank = optimize_for_inference(make_model("ast", keep_rate=0.6)), torch.randn(2, 128, 128)
    features = FeatureConfig(frames=128, mean=0.0, std=1.0)
    pruneattn.save_pretrained(fast, tmp_path / "m.safetensors", features=features, labels="abcde", multilabel=False)
    again = pruneattn.load_pretrained(tmp_path / "m.safetensors")
    state = again.state_dict()
    assert all(torch.equal(tensor, state.pop(name)) for name, tensor in fast.state_dict().items()) and not state
    assert torch.equal(optimize_for_inference(again)(fbank), fast(fbank))


def test_a_copy_has_its_own_keep_rate(make_model):
    fast = optimize_for_inference(make_model("ast"))
    other = copy.deepcopy(fast)
    other.set_keep_rate(0.5)
    assert fast.keep_rates == (1.0,) * 3 and other.blocks[0].mlp.fc1.packed is fast.blocks[0].mlp.fc1.packed


def test_unsupported_uses_are_rejected(make_model):
    with pytest.raises(UserError, match="optimize_for_inference: Linear has no known list of blocks"):
        optimize_for_inference(torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="expected a model created by pruneattn.create_model, got Linear"):
        optimize.optimize_for_inference(torch.nn.Linear(2, 2))
    with pytest.raises(
        UserError, match="dtype must be torch.float32, torch.bfloat16, torch.int8 or 'auto', got torch.float16"
    ):
        optimize_for_inference(make_model("ast"), torch.float16)
    fast = optimize_for_inference(make_model("ast"))
    assert optimize_for_inference(fast) is fast and not fast.training
    with pytest.raises(UserError, match="already packed in torch.float32"):
        optimize_for_inference(fast, torch.bfloat16)
    with pytest.raises(UserError, match="has no gradients: load it again to train it"):
        fast(torch.randn(1, 128, 128, requires_grad=True))
    fbank = torch.randn(1, 128, 128)
    expected = fast(fbank)
    for part in (fast, fast.blocks, fast.blocks[1], fast.blocks[1].attn, fast.blocks[1].mlp.fc1):
        with pytest.raises(UserError, match="cannot be moved or cast: move or cast it first"):
            part.double()
    for holder in (fast, torch.nn.ModuleDict({"m": fast})):
        names = {name: torch.zeros_like(tensor) for name, tensor in holder.state_dict().items()}
        with pytest.raises(UserError, match="accepts no new weights: load them first"):
            holder.load_state_dict(names)
    message = "packed in torch.float32; call it outside autocast"
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UserError, match=message):
        fast(fbank)
    assert torch.equal(fast(fbank), expected)


def test_layers_with_hooks_stay_as_they_are(make_model):
    model, fbank = make_model("ast", keep_rate=0.5), torch.randn(2, 128, 128)
    for layer in (model.blocks[0].mlp.fc1, model.blocks[1].attn.proj, model.blocks[2].attn.qkv):
        layer.register_forward_hook(lambda module, args, output: output / 2)
    with torch.no_grad():
        expected = model(fbank)
        torch.testing.assert_close(optimize_for_inference(model)(fbank), expected, rtol=1e-4, atol=1e-5)
    assert len(packed(model)) == 4 * 10 + 3 - 3


@pytest.mark.slow
def test_compiled_models_run_packed_layers(make_model):
    torch._dynamo.reset()
    fast = optimize_for_inference(make_model("ast", keep_rate=0.5, depth=4, prune_blocks=(1,)))
    fbank = torch.randn(2, 128, 128)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(fast, backend="eager")(fbank), fast(fbank))


@pytest.mark.parametrize("bias", [True, False])
def test_packed_layers_equal_linear_layers(bias):
    linear, x, residual = torch.nn.Linear(24, 36, bias), torch.randn(2, 5, 24), torch.randn(2, 36, 5).transpose(1, 2)
    layer = PackedLinear.of(linear)
    assert PackedLinear.of(layer) is layer and list(layer.state_dict()) == list(linear.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(layer(x), linear(x))
        torch.testing.assert_close(layer.gelu(x), F.gelu(linear(x)))
        torch.testing.assert_close(layer.add(x, residual), residual + linear(x))
    joint = torch.nn.Linear(24, 3 * 12, bias)  # 12 channels each, of 24
    for parts in (("qkv",), ("q", "kv"), ("q", "k", "v")):
        layer = PackedQKV.of(joint, parts)
        assert PackedQKV.of(layer, parts) is layer and tuple(PackedQKV.of(layer, ("qk", "v")).packed) == ("qk", "v")
        state = layer.state_dict()
        assert list(state) == list(joint.state_dict())
        assert all(torch.equal(state[name], tensor) for name, tensor in joint.state_dict().items())
        with torch.no_grad():
            torch.testing.assert_close(layer(x), joint(x))
            torch.testing.assert_close(torch.cat(layer.project(x, "kv"), -1), joint(x)[..., 12:])


class OwnPruning(pruneattn.Pruning):
    """By the norm of the values, with the projections in the order of ``steps``."""

    def __init__(self, parts, steps):
        self.parts, self.steps = parts, steps

    def __call__(self, attn, x, y, keep, extra, values):
        views = {}
        for step in self.steps:
            views |= zip(step, attn.project(y, step), strict=True)
        scores = views["v"].square().mean((1, 3))[:, extra:]
        return self.select_then_query(attn, x, y, scores, views["k"], views["v"], keep, extra)


@pytest.mark.parametrize("parts", [("qkv",), ("q", "kv"), ("qk", "v"), ("q", "k", "v")], ids="-".join)
@pytest.mark.parametrize("steps", [("kv",), ("k", "v"), ("qk", "v"), ("qkv",)], ids="-".join)
def test_a_pruning_may_project_other_parts_than_are_packed(make_model, parts, steps):
    model, fbank = make_model("ast", score=OwnPruning(parts, steps), keep_rate=0.5), torch.randn(2, 128, 128)
    with torch.no_grad():
        expected = model(fbank)
        torch.testing.assert_close(optimize_for_inference(model)(fbank), expected, rtol=1e-4, atol=1e-5)


def test_without_onednn_the_model_runs_unchanged(make_model, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    model, fbank = make_model("audiomae", keep_rate=0.5), torch.randn(2, 128, 128)
    with torch.no_grad():
        expected = model(fbank)
        assert torch.equal(optimize_for_inference(model)(fbank), expected)
    assert not packed(model) and not any(parameter.requires_grad for parameter in model.parameters())
