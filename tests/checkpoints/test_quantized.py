"""Checkpoints with 8-bit weights."""

import json

import pytest
import torch
from safetensors import safe_open

import pruneattn
from pruneattn import UserError, optimize_for_inference
from pruneattn.checkpoints import quantized
from pruneattn.checkpoints.opening import fingerprint, reconfigured
from pruneattn.data.fbank import FeatureConfig
from pruneattn.models import quantize
from pruneattn.models.packed import Int8Linear

pytestmark = pytest.mark.skipif(bool(quantize.why_not_int8()), reason="8-bit weights are slow on this machine")
ignore_warning = pytest.mark.filterwarnings("ignore:the model was optimized with dtype=torch.int8")
FEATURES = FeatureConfig(frames=128, mean=-6.85, std=5.57)


def save(model, path):
    pruneattn.save_pretrained(model, path, features=FEATURES, labels="abcde", multilabel=False)


@pytest.fixture
def model(make_model):
    """An AST of which one layer stays in floating point."""
    model = make_model("ast", embed_dim=384, num_heads=6, depth=2, prune_blocks=(1,), keep_rate=0.5)
    model.blocks[0].mlp.fc1.weight.data[:, 3] = 25 * 0.3
    return optimize_for_inference(model, torch.int8)


@pytest.mark.parametrize("name", ["x.safetensors", "folder"])
@pytest.mark.parametrize("stride", [16, 10])
def test_the_same_model_is_loaded(make_model, tmp_path, recwarn, name, stride):
    for family in ("audiomae", "ast")[stride == 10 :]:
        model = make_model(family, stride=stride, depth=3, prune_blocks=(1,), keep_rate=0.5)
        fast, fbank = optimize_for_inference(model, torch.int8), torch.randn(2, 128, 128)
        save(fast, tmp_path / name)
        loaded = pruneattn.load_pretrained(tmp_path / name)
        assert loaded.optimized and not loaded.training and loaded.quantization == fast.quantization
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        assert loaded.config == fast.config and fingerprint(loaded) != fingerprint(model_of(make_model, family, stride))
        assert torch.equal(loaded(fbank), fast(fbank))
        save(loaded, tmp_path / "again.safetensors")
        assert torch.equal(pruneattn.load_pretrained(tmp_path / "again.safetensors")(fbank), fast(fbank))
    assert not [warning for warning in recwarn if "dequantized" in str(warning.message)]


def model_of(make_model, family, stride):
    model = make_model(family, stride=stride, depth=3, prune_blocks=(1,), keep_rate=0.5)
    model.features = FEATURES
    return model


def test_contents_of_the_file(model, tmp_path):
    save(model, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        content = json.loads(file.metadata()["pruneattn"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    assert content["format_version"] == 3 and content["quantization"]["dtype"] in ("bfloat16", "float32")
    eight = [name for name, tensor in tensors.items() if tensor.dtype == torch.int8]
    assert len(eight) == 7 and "blocks.0.mlp.fc1.weight" not in eight
    for name in eight:
        scale = tensors.pop(f"{name}_scale")
        assert scale.dtype == torch.float32 and scale.shape == tensors[name].shape[:1]
    assert set(tensors) == set(pruneattn.create_model(**model.config).state_dict())
    fbank = torch.randn(2, 128, 128)
    loaded = pruneattn.load_pretrained(tmp_path / "x.safetensors")
    assert loaded.quantization.kept == model.quantization.kept and len(loaded.quantization.kept) == 1
    assert torch.equal(loaded(fbank), model(fbank))


@ignore_warning
def test_other_uses_get_dequantized_weights(model, tmp_path):
    save(model, tmp_path / "x.safetensors")
    plain = pruneattn.create_model(**model.config)
    report = pruneattn.load_checkpoint(plain, tmp_path / "x.safetensors")
    assert not report.missing and not report.unused
    assert torch.equal(plain.blocks[1].attn.qkv.weight, model.blocks[1].attn.qkv.weight)
    with pytest.warns(UserWarning, match="resampled"):
        other = pruneattn.load_pretrained(tmp_path / "x.safetensors", stride=10)
    assert other.quantization is None and torch.equal(other.blocks[0].mlp.fc2.weight, model.blocks[0].mlp.fc2.weight)
    other = reconfigured(model, score="column_mean")
    assert other.quantization is None and torch.equal(other.blocks[0].mlp.fc2.weight, model.blocks[0].mlp.fc2.weight)


def test_machines_on_which_8_bits_are_slow(model, tmp_path, monkeypatch):
    save(model, tmp_path / "x.safetensors")
    monkeypatch.setattr(quantized, "float_dtype", lambda: torch.float32)
    loaded = pruneattn.load_pretrained(tmp_path / "x.safetensors")
    assert loaded.quantization.dtype == loaded.head.weight.dtype == torch.float32
    assert isinstance(loaded.blocks[0].mlp.fc2, Int8Linear)
    monkeypatch.setattr(quantized, "why_not_int8", lambda: "it has no instructions")
    with pytest.warns(UserWarning, match="slower on this machine: it has no instructions") as caught:
        loaded = pruneattn.load_pretrained(tmp_path / "x.safetensors")
    assert len(caught) == 1 and caught[0].filename == __file__
    assert loaded.quantization is None and not loaded.optimized and loaded.head.weight.dtype == torch.float32
    fbank = torch.randn(2, 128, 128)
    with torch.no_grad(), pruneattn.at_keep_rate(loaded, 1.0), pruneattn.at_keep_rate(model, 1.0):
        assert (loaded(fbank) - model(fbank)).norm() < 0.1 * loaded(fbank).norm()


def test_damaged_files_are_rejected(model, tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save(model, path)
    for damaged in ({"dtype": "float9", "errors": []}, {"errors": []}, None):
        with monkeypatch.context() as patch:
            patch.setattr("pruneattn.checkpoints.pretrained.to_plain", lambda quantization, to=damaged: to)
            save(model, path)
        with pytest.raises(UserError, match="its configuration and its weights do not match"):
            pruneattn.load_pretrained(path)
