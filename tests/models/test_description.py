"""Features, labels and further values that a model carries in addition to its weights."""

import copy
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from pruneattn import create_model
from pruneattn.data import FeatureConfig
from pruneattn.models import PrunedViT
from pruneattn.models.description import Description

SIZES = {"embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 2, "frames": 32, "prune_blocks": (1,)}
VALUES = {
    "features": FeatureConfig(frames=32, mean=-4.0, std=3.0),
    "labels": ["speech", "music"],
    "multilabel": True,
    "extra": {"metric": 0.5},
}


@pytest.fixture
def model():
    return create_model("ast_tiny", **SIZES).eval()


@pytest.fixture
def described(model):
    for name, value in copy.deepcopy(VALUES).items():
        setattr(model, name, value)
    return model


def values_of(model):
    return {name: getattr(model, name) for name in VALUES}


def test_a_new_model_has_an_empty_description(model):
    assert values_of(model) == {"features": None, "labels": None, "multilabel": None, "extra": {}}
    assert model.description == Description()


def test_each_model_has_its_own_description(model):
    model.extra["metric"] = 1.0
    assert create_model("ast_tiny", **SIZES).extra == {}


@pytest.mark.parametrize("name", VALUES)
def test_an_assigned_value_is_in_the_description_and_nowhere_else(model, name):
    setattr(model, name, VALUES[name])
    assert getattr(model, name) is VALUES[name] is getattr(model.description, name)
    assert model.description == Description(**{name: VALUES[name]})
    assert name not in vars(model) and name not in model.state_dict()


def test_a_replaced_description_is_read_through_the_model(described):
    described.description = Description(labels=["a", "b"])
    assert values_of(described) == {"features": None, "labels": ["a", "b"], "multilabel": None, "extra": {}}


def test_the_class_documents_each_value():
    for name in VALUES:
        assert getattr(PrunedViT, name).__doc__


def test_a_copy_is_independent(described):
    other = copy.deepcopy(described)
    assert values_of(other) == VALUES
    other.labels[0], other.extra["metric"] = "noise", 0.1
    other.features, other.multilabel = None, False
    assert values_of(described) == VALUES


def test_pickled_and_saved_models_keep_it(described, tmp_path):
    torch.save(described, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (pickle.loads(pickle.dumps(described)), loaded):
        assert values_of(other) == VALUES


def test_a_compiled_model_has_the_description_of_the_model(described):
    compiled = torch.compile(described, backend="eager")
    assert values_of(compiled) == VALUES
    compiled.description.labels = ["a", "b"]
    assert described.labels == ["a", "b"]


@pytest.mark.slow
def test_another_description_does_not_recompile_a_model(described):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled, fbank = torch.compile(described, fullgraph=True, backend=counter), torch.randn(1, 32, 128)
    with torch.no_grad():
        torch.testing.assert_close(compiled(fbank), described(fbank))
        described.description = Description(labels=["a", "b"])
        torch.testing.assert_close(compiled(fbank), described(fbank))
    assert counter.frame_count == 1
