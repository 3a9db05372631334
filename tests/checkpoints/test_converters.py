import pytest
import torch

from pruneattn.checkpoints.converters import (
    AST_HUGGING_FACE,
    AST_HUGGING_FACE_MODULES,
    AST_OFFICIAL,
    FORMATS,
    detect_format,
)
from pruneattn.errors import UserError
from pruneattn.models import create_model


def names_of(family):
    return list(create_model(f"{family}_tiny", embed_dim=8, depth=12, num_heads=1, frames=16).state_dict())


@pytest.mark.parametrize("format_", FORMATS, ids=lambda format_: format_.name)
def test_each_table_is_its_own_inverse(format_):
    names = names_of(format_.family)
    targets = {name: format_.targets(name) for name in names}
    keys = [key for parts in targets.values() for key in parts]
    assert all(targets.values()) and len(set(keys)) == len(keys)
    for order in (keys, keys[::-1]):  # the order of a tensor's parts does not depend on the file
        sources, unused = format_.sources(order)
        assert sources == targets and unused == []


@pytest.mark.parametrize("format_", FORMATS, ids=lambda format_: format_.name)
def test_each_format_is_recognized(format_):
    keys = {key for name in names_of(format_.family) for key in format_.targets(name)} | set(format_.marks)
    assert detect_format(dict.fromkeys(keys, Tensor()), "x") is format_


class Tensor:
    shape = (1, 1, 1, 1)

    def dim(self):
        return 4


def test_parts_and_numbers():
    layer = "audio_spectrogram_transformer.encoder.layer.11"
    assert AST_HUGGING_FACE.targets("blocks.11.attn.qkv.bias") == [
        f"{layer}.attention.attention.{part}.bias" for part in ("query", "key", "value")
    ]
    assert AST_HUGGING_FACE.targets("blocks.11.mlp.fc2.weight") == [f"{layer}.output.dense.weight"]
    assert AST_HUGGING_FACE.targets("blocks.11.attn.proj.weight") == [f"{layer}.attention.output.dense.weight"]
    assert AST_HUGGING_FACE.targets("head.weight") == ["classifier.dense.weight"]
    assert AST_OFFICIAL.targets("head_norm.bias") == ["mlp_head.0.bias"]
    assert AST_OFFICIAL.targets("fc_norm.weight") == AST_OFFICIAL.targets("xblocks.1.norm1.bias") == []


def test_only_a_whole_prefix_may_be_absent():
    full = AST_HUGGING_FACE.targets("cls_token")[0]
    bare = full.removeprefix("audio_spectrogram_transformer.")
    assert AST_HUGGING_FACE.sources([bare]) == ({"cls_token": [bare]}, [])
    assert AST_HUGGING_FACE.sources(["transformer." + bare]) == ({}, ["transformer." + bare])
    with pytest.raises(UserError, match="no known checkpoint format"):
        detect_format({"x": Tensor()}, "file")


@pytest.mark.parametrize("format_", FORMATS, ids=lambda format_: format_.name)
def test_a_state_dict_in_another_format(format_):
    state = create_model(
        f"{format_.family}_tiny", embed_dim=8, depth=2, num_heads=1, frames=16, prune_blocks=()
    ).state_dict()
    renamed = format_.from_ours(state)
    sources, unused = format_.sources(renamed)
    assert unused == [] and sources.keys() == state.keys()
    for name, keys in sources.items():
        assert torch.equal(torch.cat([renamed[key] for key in keys]), state[name])
        assert all(renamed[key].is_contiguous() for key in keys)


def test_module_names_of_transformers():
    """The names in memory, which depend on the version of transformers, are those of one of the two tables."""
    transformers = pytest.importorskip("transformers")
    ours = create_model("ast_tiny", embed_dim=8, depth=2, num_heads=2, num_classes=3, frames=32, prune_blocks=())
    config = transformers.ASTConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        frequency_stride=16,
        time_stride=16,
        max_length=32,
        num_labels=3,
    )
    theirs = transformers.ASTForAudioClassification(config)
    new = int(transformers.__version__.split(".")[0]) >= 5
    state = (AST_HUGGING_FACE_MODULES if new else AST_HUGGING_FACE).from_ours(ours.state_dict())
    theirs.load_state_dict(state)  # strict
    assert torch.equal(theirs.classifier.dense.weight, ours.head.weight)
