"""Small files of each layout, checked by the logits of the source model if one can run."""

import argparse

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pruneattn.checkpoints.load_checkpoint import load_checkpoint
from pruneattn.errors import UserError
from pruneattn.models import create_model

DIM, DEPTH, HEADS, CLASSES = 48, 3, 3, 7


def make(family, **arguments):
    defaults = {"embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS, "num_classes": CLASSES, "prune_blocks": (1,)}
    return create_model(f"{family}_tiny", **defaults | arguments)


def randomize(module, seed=0):
    """Weights that reveal every mistake: no value is zero, one, or equal to its neighbor."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + 0.1)
    return module.eval()


def fbank(frames=1024):
    return torch.randn(1, frames, 128, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same_logits(model, expected, frames=1024):
    torch.testing.assert_close(model.eval()(fbank(frames)), expected, rtol=1e-4, atol=1e-4)


def assert_untouched(model, before):
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# AST -----------------------------------------------------------------------------------------------------------------


class OfficialAST(nn.Module):
    """The official AST around timm's distilled ViT, with the keys of its checkpoints (`v.`, `mlp_head.`)."""

    def __init__(self):
        super().__init__()
        deit = pytest.importorskip("timm.models.deit")
        self.v = deit.VisionTransformerDistilled(
            img_size=(128, 1024), patch_size=16, in_chans=1, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, num_classes=10
        )
        self.mlp_head = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, CLASSES))

    def forward(self, fbank):
        patches = self.v.patch_embed(fbank.unsqueeze(1).transpose(2, 3))
        extra = torch.cat([self.v.cls_token, self.v.dist_token], dim=1).expand(len(patches), -1, -1)
        x = torch.cat([extra, patches], dim=1) + self.v.pos_embed
        x = self.v.norm(self.v.blocks(x))
        return self.mlp_head((x[:, 0] + x[:, 1]) / 2)


def test_ast_official(tmp_path):
    source = randomize(OfficialAST())
    torch.save({f"module.{key}": value for key, value in source.state_dict().items()}, tmp_path / "audioset_16_16.pth")
    model = make("ast")
    report = load_checkpoint(model, tmp_path / "audioset_16_16.pth")
    assert_same_logits(model, source(fbank()))
    assert report.format == "AST, official"
    assert set(report.unused) == {"v.head.weight", "v.head.bias", "v.head_dist.weight", "v.head_dist.bias"}
    assert report.missing == report.notes == []
    assert ("mlp_head.0.weight", "head_norm.weight") in report.converted
    assert len(report.converted) == len(source.state_dict()) - 4 == len(model.state_dict())
    assert "not used: v.head.weight" in str(report) and "AST, official" in str(report)


def hugging_face(**config):
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": DIM, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "intermediate_size": 4 * DIM}
    stride = {"frequency_stride": 16, "time_stride": 16, "max_length": 1024, "num_labels": CLASSES}
    return randomize(transformers.ASTForAudioClassification(transformers.ASTConfig(**shape | stride | config)))


def exact_eps(source):
    """Set the official eps in Hugging Face's model, so that its logits can be compared closely."""
    for name, module in source.named_modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5 if name == "classifier.layernorm" else 1e-6
    return source


def test_hugging_face_ast_as_saved(tmp_path):
    source = exact_eps(hugging_face())
    source.save_pretrained(tmp_path)
    expected = source(fbank()).logits
    for path in (tmp_path / "model.safetensors", tmp_path):
        model = make("ast")
        report = load_checkpoint(model, path)
        assert_same_logits(model, expected)
        assert report.format == "AST, Hugging Face"
        assert report.missing == report.unused == report.notes == []
    layer = "audio_spectrogram_transformer.encoder.layer.2.attention.attention"
    for part in ("query", "key", "value"):
        assert (f"{layer}.{part}.weight", "blocks.2.attn.qkv.weight") in report.converted


@pytest.mark.parametrize("save", [torch.save, save_file])
def test_hugging_face_ast_module_names(tmp_path, save):
    source = exact_eps(hugging_face())
    state = source.state_dict()
    if "audio_spectrogram_transformer.layers.0.attention.q_proj.weight" not in state:
        pytest.skip("this version of transformers has the same names in memory and on disk")
    save(state, tmp_path / "weights")
    model = make("ast")
    report = load_checkpoint(model, tmp_path / "weights")
    assert_same_logits(model, source(fbank()).logits)
    assert report.format == "AST, Hugging Face (module names of transformers 5)"
    assert report.missing == report.unused == []


def test_hugging_face_ast_with_its_own_eps(tmp_path):
    source = hugging_face()
    assert source.config.layer_norm_eps == 1e-12
    source.save_pretrained(tmp_path)
    model = make("ast")
    load_checkpoint(model, tmp_path)
    with torch.no_grad():
        difference = (model.eval()(fbank()) - source(fbank()).logits).abs().max()
    assert 0 < difference < 1e-3


def test_hugging_face_base_model_without_a_head(tmp_path):
    source = hugging_face().audio_spectrogram_transformer
    source.save_pretrained(tmp_path)
    model = make("ast")
    before = snapshot(model)
    report = load_checkpoint(model, tmp_path)
    assert sorted(report.missing) == ["head.bias", "head.weight", "head_norm.bias", "head_norm.weight"]
    assert_untouched(model, {name: before[name] for name in report.missing})
    assert torch.equal(model.dist_token, source.embeddings.distillation_token)


def test_hugging_face_pytorch_bin_in_a_folder(tmp_path):
    source = hugging_face()
    torch.save(source.state_dict(), tmp_path / "pytorch_model.bin")
    model = make("ast")
    load_checkpoint(model, tmp_path)
    assert torch.equal(model.head.weight, source.classifier.dense.weight)


def test_hugging_face_default_stride_is_resampled(tmp_path):
    source = hugging_face(frequency_stride=10, time_stride=10)
    assert source.audio_spectrogram_transformer.embeddings.position_embeddings.shape[1] == 1214
    source.save_pretrained(tmp_path)
    model = make("ast")
    with pytest.warns(UserWarning, match="stride 10") as caught:
        report = load_checkpoint(model, tmp_path)
    assert caught[0].filename == __file__
    table = source.audio_spectrogram_transformer.embeddings.position_embeddings
    torch.testing.assert_close(model.pos_embed[0, 2], table[0, 2])  # the corners of both grids are the same cell
    torch.testing.assert_close(model.pos_embed[0, 2 + 5 * 64 + 10], table[0, 2 + 8 * 101 + 16])
    assert any("stride 10" in note for note in report.notes) and "stride 10" in str(report)


# AudioMAE ------------------------------------------------------------------------------------------------------------


def timm_audiomae(**arguments):
    vit = pytest.importorskip("timm.models.vision_transformer")
    return randomize(
        vit.VisionTransformer(
            img_size=(1024, 128),
            patch_size=16,
            in_chans=1,
            num_classes=CLASSES,
            embed_dim=DIM,
            depth=DEPTH,
            num_heads=HEADS,
            global_pool="avg",
            **arguments,
        )
    )


def test_audiomae_of_timm(tmp_path):
    source = timm_audiomae()
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    model = make("audiomae")
    report = load_checkpoint(model, tmp_path)
    assert_same_logits(model, source(fbank().unsqueeze(1)))
    assert report.missing == report.unused == report.notes == []
    assert not model.pos_embed.requires_grad


def test_audiomae_of_timm_with_norm_instead_of_fc_norm(tmp_path):
    source = timm_audiomae(fc_norm=False)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    model = make("audiomae")
    before = snapshot(model)
    report = load_checkpoint(model, tmp_path)
    assert sorted(report.missing) == ["fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight"]
    assert sorted(report.unused) == ["head.bias", "head.weight", "norm.bias", "norm.weight"]
    assert "norm before the mean" in report.notes[0]
    assert_untouched(model, {name: before[name] for name in report.missing})
    assert torch.equal(model.blocks[2].mlp.fc2.weight, source.blocks[2].mlp.fc2.weight)


def audiomae_state(seed=3):
    """Trunk, `fc_norm` and `head` with the keys of AudioMAE's fine-tuned files."""
    return snapshot(randomize(make("audiomae"), seed))


def pretrained_state():
    state = {name: value for name, value in audiomae_state().items() if not name.startswith(("fc_norm", "head"))}
    return state | {
        "norm.weight": torch.ones(DIM),
        "norm.bias": torch.zeros(DIM),
        "mask_token": torch.zeros(1, 1, 32),
        "decoder_pos_embed": torch.zeros(1, 513, 32),
        "decoder_embed.weight": torch.zeros(32, DIM),
        "decoder_blocks.0.attn.qkv.weight": torch.zeros(96, 32),
        "decoder_norm.weight": torch.ones(32),
        "decoder_pred.bias": torch.zeros(256),
    }


def test_audiomae_pretrained(tmp_path):
    state = pretrained_state()
    torch.save({"model": state}, tmp_path / "pretrained.pth")
    model = make("audiomae")
    before = snapshot(model)
    report = load_checkpoint(model, tmp_path / "pretrained.pth")
    assert report.format == "AudioMAE, pretrained"
    assert sorted(report.missing) == ["fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight"]
    assert sorted(report.unused) == sorted(key for key in state if key.startswith(("decoder", "mask_token", "norm.")))
    assert_untouched(model, {name: before[name] for name in report.missing})
    assert all(torch.equal(model.state_dict()[key], state[key]) for key, _ in report.converted)
    assert "left at their initial values: fc_norm.weight" in str(report)


def test_audiomae_fine_tuned_with_args(tmp_path):
    source = randomize(make("audiomae"), seed=3)
    args = argparse.Namespace(model="vit_base_patch16", lr=1e-3, dist_url="env://", mask_2d=True)
    content = {"model": source.state_dict(), "optimizer": {"state": {}}, "epoch": 59, "scaler": {}, "args": args}
    torch.save(content, tmp_path / "finetuned.pth")
    model = make("audiomae")
    report = load_checkpoint(model, tmp_path / "finetuned.pth")
    assert_same_logits(model, source(fbank()))
    assert report.missing == report.unused == []


@pytest.mark.parametrize("frames", [128, 512])
def test_positions_follow_the_models_frames(tmp_path, frames):
    for family, extra, start in (("audiomae", 1, 0), ("ast", 2, 32 - frames // 32)):
        state = snapshot(make(family))
        state["pos_embed"][0, extra:] = torch.arange(512.0).unsqueeze(1)
        torch.save(state, tmp_path / "weights.pth")
        model = make(family, frames=frames)
        report = load_checkpoint(model, tmp_path / "weights.pth")
        columns = frames // 16
        expected = [64 * row + start + column for row in range(8) for column in range(columns)]
        assert model.pos_embed[0, extra:, 0].tolist() == expected
        assert f"64 time columns to {columns}" in report.notes[0]


# pruneattn's own files, and properties of all formats ----------------------------------------------------------------


@pytest.mark.parametrize("family", ["ast", "audiomae"])
def test_training_state_round_trip_is_bit_equal(tmp_path, family):
    source = randomize(make(family))
    optimizer = torch.optim.AdamW(source.parameters())
    state = {"model": source.state_dict(), "optimizer": optimizer.state_dict(), "config": {"lr": 0.1}, "log_bytes": 3}
    torch.save(state, tmp_path / "last.pt")
    model = make(family)
    report = load_checkpoint(model, tmp_path / "last.pt")
    assert_untouched(model, source.state_dict())
    assert report.missing == report.unused == report.notes == []
    assert len(report.converted) == len(source.state_dict())


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_half_precision_files(tmp_path, stored):
    source = randomize(make("ast"))
    save_file({name: value.to(stored) for name, value in source.state_dict().items()}, tmp_path / "half.safetensors")
    model = make("ast")
    load_checkpoint(model, tmp_path / "half.safetensors")
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, source.state_dict()[name].to(stored).float())


@pytest.mark.parametrize(("family", "fresh"), [("ast", {"head", "head_norm"}), ("audiomae", {"head"})])
def test_a_head_of_other_classes_keeps_its_initial_values(tmp_path, family, fresh):
    torch.save(randomize(make(family, num_classes=5)).state_dict(), tmp_path / "x.pt")
    model = make(family)
    before = snapshot(model)
    report = load_checkpoint(model, tmp_path / "x.pt")
    assert {name.partition(".")[0] for name in report.missing} == fresh
    assert sorted(report.missing) == sorted(report.unused)
    assert_untouched(model, {name: before[name] for name in report.missing})
    assert report.notes == ["head: 5 classes in the file and 7 in the model, so the head keeps its initial values"]


def test_the_best_file_of_a_training_folder(tmp_path):
    source = randomize(make("audiomae"))
    save_file(source.state_dict(), tmp_path / "best.safetensors")
    torch.save({}, tmp_path / "last.pt")
    model = make("audiomae")
    assert load_checkpoint(model, str(tmp_path)).path == str(tmp_path / "best.safetensors")
    assert_untouched(model, source.state_dict())


# Errors: one message that names the file and the remedy, and an unchanged model --------------------------------------


def ast_state(**changes):
    return snapshot(randomize(make("ast", **changes)))


def without(state, *names):
    return {name: value for name, value in state.items() if name not in names}


REJECTED = {
    "width": (
        lambda: ast_state(embed_dim=24),
        r"embed_dim 24 and depth 3 .*\[72, 24\].*but.* embed_dim 48 and depth 3 .*embed_dim=24, depth=3",
    ),
    "a known size": (
        lambda: ast_state() | {f"blocks.{i}.attn.qkv.weight": torch.ones(576, 192) for i in range(12)},
        r"depth 12 .*create the model with create_model\('ast_tiny'\)",
    ),
    "depth": (lambda: ast_state(depth=2), r"depth 2 .*has embed_dim 48 and depth 3"),
    "family": (audiomae_state, r"AudioMAE.*does not fit the model ast_tiny.*create_model\('audiomae_base'\)"),
    "incomplete": (
        lambda: without(ast_state(), "blocks.1.norm2.bias", "norm.weight"),
        r"without blocks.1.norm2.bias, norm.weight; use a complete",
    ),
    "more parts": (lambda: ast_state() | {"blocks.0.ls1.gamma": torch.ones(DIM)}, r"does not have.*blocks.0.ls1.gamma"),
    "shape": (
        lambda: ast_state() | {"blocks.1.mlp.fc1.bias": torch.ones(96)},
        r"blocks.1.mlp.fc1.bias is \[96\] and the model's blocks.1.mlp.fc1.bias \[192\]",
    ),
    "RGB": (
        lambda: ast_state() | {"patch_embed.proj.weight": torch.ones(DIM, 3, 16, 16)},
        r"patch_embed.proj.weight is \[48, 3, 16, 16\]: patches of 3 channels",
    ),
    "positions": (lambda: ast_state() | {"pos_embed": torch.ones(1, 198, DIM)}, r"196 patches are not a grid"),
    "parts": (
        lambda: {
            "embeddings.position_embeddings": torch.ones(1, 514, DIM),
            "layers.0.attention.q_proj.weight": torch.ones(DIM, DIM),
            "layers.0.attention.k_proj.weight": torch.ones(DIM, 2),
        },
        r"do not fit together: layers.0.attention.q_proj.weight \[48, 48\], layers.0.attention.k_proj.weight",
    ),
    "unknown": (
        lambda: {f"conv{i}.weight": torch.ones(1) for i in range(9)},
        (
            r"no known checkpoint format. Looked for AST, official \(v.pos_embed.*AudioMAE, pretrained.*"
            r"has 9 tensors: conv0.weight.*conv5.weight, \.\.\."
        ),
    ),
    "nothing": (lambda: {"epoch": 3, "args": {}}, r"no state dict in it.*\(epoch, args\)"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_files_that_do_not_fit_are_rejected(tmp_path, case):
    state, message = REJECTED[case]
    path = tmp_path / "checkpoint.pth"
    torch.save(state(), path)
    model = make("ast")
    before = snapshot(model)
    with pytest.raises(UserError, match=message) as error:
        load_checkpoint(model, path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert_untouched(model, before)


def test_ast_into_audiomae_is_rejected(tmp_path):
    torch.save(ast_state(), tmp_path / "x.pt")
    with pytest.raises(UserError, match="AST, pruneattn, which does not fit the model audiomae_tiny"):
        load_checkpoint(make("audiomae"), tmp_path / "x.pt")
