"""Layers that `optimize_for_inference` packs in the blocks of other libraries, and the steps that it fuses."""

import pytest
import torch
from torch import nn

import pruneattn
from pruneattn import UserError, optimize_for_inference
from pruneattn.models.optimize import PackedLinear, PackedQKV, can_pack

DEPTH = 4

pytestmark = pytest.mark.skipif(not can_pack(torch.zeros(1, 1)), reason="this PyTorch has no oneDNN")


class Doubled(nn.Module):
    """A wrapper as LoRA's: it holds the layer, and computes more than it does."""

    def __init__(self, linear):
        super().__init__()
        self.base_layer = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x):
        return 2 * self.base_layer(x)


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


def wrap(linear):
    return Doubled(linear)


def derive(linear):
    other = Halved(linear.in_features, linear.out_features)
    other.load_state_dict(linear.state_dict())
    return other


def parametrize(linear):
    return nn.utils.parametrizations.weight_norm(linear)


def add_hook(linear):
    linear.register_forward_hook(lambda module, args, output: output + 1)
    return linear


@pytest.mark.parametrize("change", [wrap, derive, parametrize, add_hook])
@pytest.mark.parametrize("part", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_other_layers_than_plain_linear_layers_stay_as_they_are(make_subject, change, part, packed, assert_close):
    subject = make_subject("timm")
    model = pruneattn.prune(subject.model, 0.5, (1,), "cls")
    owner, _, name = part.rpartition(".")
    for block in model.blocks[:2]:
        owning = block.get_submodule(owner)
        setattr(owning, name, change(getattr(owning, name)).eval())
    expected = subject.call().detach()
    optimize_for_inference(model)
    kinds = [type(block.get_submodule(part)) for block in model.blocks]
    assert not any(issubclass(kind, (PackedLinear, PackedQKV)) for kind in kinds[:2])
    assert all(issubclass(kind, (PackedLinear, PackedQKV)) for kind in kinds[2:])
    assert len(packed(model.blocks[0])) == 3
    assert_close(subject.call(), expected)


@pytest.mark.parametrize("activation", [nn.GELU(), nn.GELU("tanh"), nn.ReLU(), nn.SiLU()], ids=repr)
def test_only_the_exact_gelu_is_fused(make_subject, activation, assert_close):
    subject = make_subject("timm")
    for block in subject.model.blocks:
        block.mlp.act = activation
    expected = subject.call().detach()
    optimize_for_inference(subject.model)
    assert_close(subject.call(), expected)
    calls = []
    activation.register_forward_hook(lambda *_: calls.append(1))
    subject.call()
    assert len(calls) == (0 if repr(activation) == "GELU(approximate='none')" else DEPTH)


def make_mlp(name):
    """An MLP of timm, or one that differs from timm's: in its parts, or only in its forward."""
    layers = pytest.importorskip("timm").layers
    if hasattr(layers, name):
        return getattr(layers, name)

    class Gated(layers.Mlp):
        def __init__(self, in_features, hidden_features, **arguments):
            super().__init__(in_features, hidden_features, **arguments)
            self.gate = nn.Linear(hidden_features, hidden_features)

        def forward(self, x):
            x = self.act(self.fc1(x))
            return self.fc2(x * self.gate(x))

    class SecondActivation(layers.Mlp):
        def forward(self, x):
            return self.act(super().forward(x))

    return locals()[name]


@pytest.mark.parametrize("layer", ["GluMlp", "SwiGLU", "Gated"])
def test_other_mlps_run_as_they_are_with_packed_layers(make_subject, layer, packed, assert_close):
    subject = make_subject("timm", mlp_layer=make_mlp(layer))
    expected = subject.call().detach()
    optimize_for_inference(subject.model)
    assert len(packed(subject.model)) == DEPTH * (4 if layer == "GluMlp" else 5)
    assert_close(subject.call(), expected)


def test_fused_steps_that_compute_something_else_are_rejected(make_subject, packed):
    subject = make_subject("timm", mlp_layer=make_mlp("SecondActivation"))
    expected = subject.call()
    with pytest.raises(UserError, match=r"blocks\[0\] has the parts of a ViT's block, but combines them differently"):
        optimize_for_inference(subject.model)
    assert not packed(subject.model) and torch.equal(subject.call(), expected)


def test_dropout_rates_have_no_effect(make_subject, assert_close):
    rates = {"attn_drop_rate": 0.3, "proj_drop_rate": 0.2, "drop_path_rate": 0.5}
    subject = make_subject("timm", **rates)
    expected = subject.call().detach()
    optimize_for_inference(subject.model.train())
    assert_close(subject.call(), expected)
