"""Small models of all families that ``optimize_for_inference`` supports, with their inputs."""

import copy
from pathlib import Path

import pytest
import torch

import pruneattn

DEPTH, DIM, HEADS, BLOCKS = 4, 24, 3, (1, 2)
EXAMPLE = Path(__file__).parents[2] / "python" / "prune_own_backbone.py"


def ast_config(**arguments):
    import transformers

    return transformers.ASTConfig(
        hidden_size=DIM,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * DIM,
        num_mel_bins=32,
        max_length=96,
        frequency_stride=16,
        time_stride=16,
        num_labels=5,
        **arguments,
    )


def whisper_config(**arguments):
    import transformers

    return transformers.WhisperConfig(
        d_model=DIM,
        encoder_layers=DEPTH,
        encoder_attention_heads=HEADS,
        encoder_ffn_dim=4 * DIM,
        decoder_layers=1,
        decoder_attention_heads=HEADS,
        decoder_ffn_dim=DIM,
        num_mel_bins=8,
        max_source_positions=12,
        max_target_positions=8,
        vocab_size=30,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        classifier_proj_size=16,
        num_labels=5,
        **arguments,
    )


class Subject:
    """A model, keyword arguments for a call, and the output of a call.

    Attributes:
        model: the model.
        inputs: keyword arguments of a call, float32.
        trunk: the part of the model that runs the blocks; for example the encoder.
    """

    def __init__(self, kind, model, inputs):
        self.kind, self.model, self.inputs = kind, model, inputs

    @property
    def trunk(self):
        if self.kind == "whisper_decoder":
            return self.model.model.encoder
        return self.model.encoder if self.kind == "whisper_classifier" else self.model

    @property
    def blocks(self):
        model = self.trunk
        if self.kind == "ast":
            base = model.base_model
            return base.layers if hasattr(base, "layers") else base.encoder.layer
        if self.kind == "registered":
            return model.encoder.layers
        return model.layers if self.kind.startswith("whisper") else model.blocks

    def call(self, model=None, **changed):
        """Output tensor of the model, or of a copy of it."""
        output = (self.model if model is None else model)(**self.inputs | changed)
        if isinstance(output, torch.Tensor):
            return output
        return output.logits if hasattr(output, "logits") else output.last_hidden_state

    def prune(self, *arguments):
        """Prune the trunk; return the model."""
        pruneattn.prune(self.trunk, *arguments)
        return self.model

    def copy(self):
        """A copy of the model with the same inputs."""
        return Subject(self.kind, copy.deepcopy(self.model), self.inputs)


def make_subject(kind, randomize, load_file, plain, batch=2, **arguments):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    if kind == "plain":
        return Subject(kind, randomize(plain.ViT(dim=DIM, heads=HEADS, depth=DEPTH)), {"x": noise(batch, 10, DIM)})
    if kind == "registered":
        example = load_file(EXAMPLE)
        model = example.SpectrogramEncoder(dim=DIM, depth=DEPTH, heads=HEADS, frames=64, num_classes=5)
        return Subject(kind, randomize(model), {"fbank": noise(batch, 64, 128)})
    if kind.startswith("timm"):
        timm = pytest.importorskip("timm")
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": DIM, "num_heads": HEADS, "depth": DEPTH}
        if kind == "timm_parts":
            arguments = {"init_values": 0.7, "qk_norm": True, "scale_mlp_norm": True, "qkv_bias": False} | arguments
        model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=5, **sizes, **arguments)
        return Subject(kind, randomize(model), {"x": noise(batch, 3, 32, 32)})
    transformers = pytest.importorskip("transformers")
    if kind == "ast":
        model = transformers.ASTForAudioClassification(ast_config(**arguments))
        return Subject(kind, randomize(model), {"input_values": noise(batch, 96, 32)})
    inputs = {"input_features": noise(batch, 8, 24)}
    config = whisper_config(**arguments)
    if kind == "whisper":
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        return Subject(kind, randomize(WhisperEncoder(config)), inputs)
    if kind == "whisper_classifier":
        return Subject(kind, randomize(transformers.WhisperForAudioClassification(config)), inputs)
    model = transformers.WhisperForConditionalGeneration(config)
    return Subject(kind, randomize(model), inputs | {"decoder_input_ids": torch.tensor([[3, 4, 5]] * batch)})
