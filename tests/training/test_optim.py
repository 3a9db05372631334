import dataclasses

import pytest
import torch

from pruneattn.models import create_model
from pruneattn.training.optim import make_optimizer, parameter_groups, set_learning_rate
from pruneattn.training.recipes import RECIPES, Recipe


@pytest.mark.parametrize("name", ["audiomae_tiny", "ast_tiny"])
def test_layer_decay_and_weight_decay_by_parameter(name):
    model = create_model(name, num_classes=5, frames=64, embed_dim=48, num_heads=3, depth=4, prune_blocks=(1, 2))
    groups = parameter_groups(model, 0.05, 0.5)
    found = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == {id(p) for p in trained.values()}
    expected = {
        "cls_token": (1 / 32, 0.0),
        "patch_embed.proj.weight": (1 / 32, 0.05),
        "patch_embed.proj.bias": (1 / 32, 0.0),
        "blocks.0.attn.qkv.weight": (1 / 16, 0.05),
        "blocks.3.mlp.fc2.weight": (1 / 2, 0.05),
        "blocks.3.norm2.weight": (1 / 2, 0.0),
        "head.weight": (1.0, 0.05),
        "head.bias": (1.0, 0.0),
    }
    assert {name: found[id(trained[name])] for name in expected} == expected
    assert ("pos_embed" in trained) == (name == "ast_tiny")


def test_the_papers_smallest_and_largest_rate():
    model = create_model("audiomae_tiny", num_classes=5, frames=64)
    optimizer = make_optimizer(model, RECIPES["audiomae", "spc2"])
    set_learning_rate(optimizer, 2e-3)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert min(rates) == pytest.approx(2e-3 * 0.75**13) and max(rates) == 2e-3
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["betas"] == (0.9, 0.95)


def test_one_step_moves_each_layer_by_its_rate():
    recipe = dataclasses.replace(Recipe(), layer_decay=0.5, weight_decay=0.0)
    model = create_model("ast_tiny", num_classes=5, frames=64, embed_dim=48, num_heads=3, depth=4, prune_blocks=(1, 2))
    optimizer = make_optimizer(model, recipe)
    set_learning_rate(optimizer, 1e-3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()  # the first step of Adam is lr for a gradient of any size
    for name, factor in (("cls_token", 1 / 32), ("blocks.1.attn.proj.bias", 1 / 8), ("head.bias", 1.0)):
        moved = before[name] - model.get_parameter(name)
        torch.testing.assert_close(moved, torch.full_like(moved, 1e-3 * factor), rtol=1e-3, atol=1e-7)
