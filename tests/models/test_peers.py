"""Unpruned models against Hugging Face's AST and timm's vision transformer, with the same weights."""

import pytest
import torch


def huggingface_state(state):
    """Names of transformers 5 for a state dict of ours."""
    renamed = {
        "cls_token": "embeddings.cls_token",
        "dist_token": "embeddings.distillation_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
        "blocks.": "layers.",
        "norm.": "layernorm.",
    }
    parts = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj"}
    out = {}
    for name, tensor in state.items():
        if name.startswith("head"):
            out[name.replace("head_norm", "classifier.layernorm").replace("head.", "classifier.dense.")] = tensor
            continue
        for ours, theirs in renamed.items():
            if name.startswith(ours):
                name = theirs + name[len(ours) :]
                break
        for ours, theirs in parts.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
        name = f"audio_spectrogram_transformer.{name}"
        if ".attn.qkv." in name:
            for part, rows in zip("qkv", tensor.chunk(3)):
                out[name.replace("attn.qkv", f"attention.{part}_proj")] = rows
        else:
            out[name] = tensor
    return out


def test_ast_is_hugging_face_ast(make_model):
    transformers = pytest.importorskip("transformers", minversion="5")
    ours = make_model("ast", frames=256)
    theirs = transformers.ASTForAudioClassification(
        transformers.ASTConfig(
            hidden_size=24, num_hidden_layers=10, num_attention_heads=3, intermediate_size=96, max_length=256,
            frequency_stride=16, time_stride=16, num_labels=5, layer_norm_eps=1e-6,
        )  # fmt: skip
    )
    theirs.classifier.layernorm.eps = 1e-5
    theirs.load_state_dict(huggingface_state(ours.state_dict()))
    ours.double(), theirs.double().eval()
    fbank = torch.randn(2, 256, 128, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(fbank), theirs(fbank).logits, rtol=1e-9, atol=1e-9)


def test_audiomae_is_timm_vit(make_model):
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    ours = make_model("audiomae", frames=256, drop_path=0.2)
    theirs = vision_transformer.VisionTransformer(
        img_size=(256, 128), in_chans=1, embed_dim=24, depth=10, num_heads=3, num_classes=5, global_pool="avg",
        drop_path_rate=0.2,
    ).eval()  # fmt: skip
    theirs.load_state_dict(ours.state_dict())
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in theirs.blocks]
    assert [block.drop_path.rate for block in ours.blocks] == pytest.approx(rates)
    ours.double(), theirs.double()
    fbank = torch.randn(2, 256, 128, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(fbank), theirs(fbank.unsqueeze(1)), rtol=1e-9, atol=1e-9)
