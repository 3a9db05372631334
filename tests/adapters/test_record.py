"""The record of the pruning in the configuration of a Hugging Face model."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import pruneattn

transformers = pytest.importorskip("transformers")

BLOCKS = (1, 2)


def entry(keep_rate, blocks=BLOCKS, score="cls"):
    return {"keep_rate": list(keep_rate), "blocks": list(blocks), "score": score}


def recorded(model):
    return getattr(model.config, "pruneattn", None)


class Wrapper(nn.Module):
    """A wrapper with PEFT's interface: it holds the model and forwards attributes to it."""

    def __init__(self, model):
        super().__init__()
        self.base_model = nn.ModuleDict({"model": model})

    def get_base_model(self):
        return self.base_model["model"]

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.get_base_model(), name)

    def forward(self, *args, **kwargs):
        return self.get_base_model()(*args, **kwargs)


WRAPPERS = {
    "none": lambda model: model,
    "base_model": lambda model: model.base_model,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "peft": Wrapper,
}


@pytest.fixture
def ast(make_subject):
    return make_subject("ast").model


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_the_record_follows_every_change(ast, wrap):
    model = wrap(ast)
    pruneattn.prune(model, 0.5, BLOCKS)
    assert recorded(ast) == entry((0.5, 0.5))
    pruneattn.set_keep_rate(model, (0.9, 0.7))
    assert recorded(ast) == entry((0.9, 0.7))
    with pruneattn.at_keep_rate(model, 1.0):
        assert recorded(ast) == entry((1.0, 1.0))
    assert recorded(ast) == entry((0.9, 0.7))
    with pytest.raises(pruneattn.UserError):
        pruneattn.set_keep_rate(model, 2)
    assert recorded(ast) == entry((0.9, 0.7))
    pruneattn.prune(model, 0.3, (0,), "column_mean")
    assert recorded(ast) == entry((0.3,), (0,), "column_mean")
    pruneattn.unprune(model)
    assert "pruneattn" not in vars(ast.config)


def test_only_named_scores_are_recorded(ast):
    pruneattn.prune(ast, 0.5, BLOCKS)
    with pytest.raises(pruneattn.UserError):
        pruneattn.prune(ast, 0.5, BLOCKS, "intensity")
    assert recorded(ast) == entry((0.5, 0.5))  # nothing changed
    for score in (lambda q, k, v, extra: k[:, :, extra:].norm(dim=-1).mean(1), pruneattn.models.scores.ClsPruning()):
        pruneattn.prune(ast, 0.5, BLOCKS, "cls")
        pruneattn.prune(ast, 0.5, BLOCKS, score)
        pruneattn.set_keep_rate(ast, 0.7)
        assert "pruneattn" not in vars(ast.config)


def test_changes_within_at_keep_rate_remain(ast):
    pruneattn.prune(ast, 0.5, BLOCKS)
    with pruneattn.at_keep_rate(ast, 1.0):
        pruneattn.prune(ast, 0.6, (3,))
    assert recorded(ast) == entry((0.6,), (3,))
    with pruneattn.at_keep_rate(ast, 1.0):
        pruneattn.unprune(ast)
    assert "pruneattn" not in vars(ast.config)


@pytest.mark.parametrize("kind", ["ast", "whisper", "whisper_decoder", "whisper_classifier"])
def test_saved_and_loaded(make_subject, tmp_path, kind):
    subject = make_subject(kind)
    pruneattn.prune(subject.trunk, 0.5, BLOCKS)
    pruneattn.set_keep_rate(subject.model, (0.9, 0.5))
    expected = subject.call()
    subject.model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["pruneattn"] == recorded(subject.model)
    subject.model = type(subject.model).from_pretrained(tmp_path).eval()
    assert not torch.equal(subject.call(), expected)
    pruneattn.prune(subject.trunk, **subject.model.config.pruneattn)
    assert torch.equal(subject.call(), expected)
    assert recorded(subject.model) == entry((0.9, 0.5), score="cls" if kind == "ast" else "column_mean")


def test_unprune_removes_the_record_of_a_loaded_model(ast, tmp_path):
    pruneattn.prune(ast, 0.5, BLOCKS).save_pretrained(tmp_path)
    loaded = type(ast).from_pretrained(tmp_path)
    assert recorded(loaded) == entry((0.5, 0.5)) and "pruneattn" not in vars(pruneattn.unprune(loaded).config)


def test_models_of_this_package_read_the_record(tmp_path):
    config = transformers.ASTConfig(
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=96,
        max_length=128,
        frequency_stride=16,
        time_stride=16,
        num_labels=5,
    )
    model = pruneattn.prune(transformers.ASTForAudioClassification(config), (0.9, 0.5), BLOCKS, "column_mean")
    model.save_pretrained(tmp_path)
    transformers.ASTFeatureExtractor(max_length=128).save_pretrained(tmp_path)
    own = pruneattn.load_pretrained(tmp_path)
    assert (own.keep_rates, own.prune_blocks, own.score) == ((0.9, 0.5), BLOCKS, "column_mean")


def test_copies_have_their_own_record(ast):
    pruneattn.prune(ast, 0.5, BLOCKS)
    other = copy.deepcopy(ast)
    pruneattn.set_keep_rate(other, 0.7)
    assert recorded(ast) == entry((0.5, 0.5)) and recorded(other) == entry((0.7, 0.7))
    rates = recorded(ast)["keep_rate"]
    pruneattn.set_keep_rate(ast, 0.9)
    assert rates == [0.5, 0.5]  # an entry that was read does not change


def test_a_module_with_several_models_records_each(make_subject):
    first, second, third = (make_subject("ast").model for _ in range(3))
    pruneattn.prune(first, 0.5, (1,))
    pruneattn.prune(second, 0.5, (0, 2), "column_mean")
    holder = nn.ModuleList([first, second, third])
    holder.config = transformers.PretrainedConfig()
    pruneattn.set_keep_rate(holder, (0.9, 0.8, 0.7))
    assert recorded(first) == entry((0.9,), (1,)) and recorded(second) == entry((0.8, 0.7), (0, 2), "column_mean")
    assert not any("pruneattn" in vars(config) for config in (third.config, holder.config))


@pytest.mark.parametrize("config", [{}, SimpleNamespace(dim=24), "vit"])
def test_other_configurations_do_not_change(plain_vit, config):
    plain_vit.config = copy.deepcopy(config)
    pruneattn.prune(plain_vit, 0.5, BLOCKS)
    pruneattn.set_keep_rate(plain_vit, 0.7)
    assert plain_vit.config == config
    assert pruneattn.unprune(plain_vit).config == config
