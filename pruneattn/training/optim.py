"""Optimizers with a learning rate per layer."""

from __future__ import annotations

from typing import Any

import torch

from ..models.vit import PrunedViT
from .recipes import Recipe


def parameter_groups(model: PrunedViT, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Group the trainable parameters by learning rate factor and weight decay.

    Vectors (biases, norms) and the parameters that ``model.no_weight_decay()`` names have no weight decay. With a layer
    decay of 1 there are only two groups, because each group costs the optimizer a call.

    Returns:
        Groups for an optimizer, each with ``params``, ``weight_decay`` and
        ``lr_scale = layer_decay ** (number of layers above)``; the head has an ``lr_scale`` of 1.
    """
    layers = {name: model.layer_id(name) for name, p in model.named_parameters() if p.requires_grad}
    top = max(layers.values())
    undecayed = model.no_weight_decay()
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = 0.0 if parameter.ndim <= 1 or name in undecayed else weight_decay
        scale = layer_decay ** (top - layers[name])
        group = groups.setdefault((scale, decay), {"params": [], "lr_scale": scale, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def make_optimizer(model: PrunedViT, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW or Adam over `parameter_groups`. `set_learning_rate` sets the learning rate before every step."""
    kinds: dict[str, type[torch.optim.AdamW] | type[torch.optim.Adam]] = {
        "adamw": torch.optim.AdamW,
        "adam": torch.optim.Adam,
    }
    first, second = recipe.betas
    groups = parameter_groups(model, recipe.weight_decay, recipe.layer_decay)
    return kinds[recipe.optimizer](groups, lr=0.0, betas=(first, second))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group to ``lr`` times the ``lr_scale`` of the group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
