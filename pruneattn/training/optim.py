"""Optimisers with a learning rate per layer."""

import torch


def parameter_groups(model, weight_decay, layer_decay):
    """Groups by layer and weight decay; each has ``lr_scale = layer_decay ** (layers above)``.

    Vectors (biases, norms) and what ``model.no_weight_decay()`` names are not decayed. The head has scale 1. With a
    layer decay of 1 there are only two groups, since each group costs the optimiser a call.
    """
    layers = {name: model.layer_id(name) for name, p in model.named_parameters() if p.requires_grad}
    top = max(layers.values())
    undecayed = model.no_weight_decay()
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = 0.0 if parameter.ndim <= 1 or name in undecayed else weight_decay
        scale = layer_decay ** (top - layers[name])
        group = groups.setdefault((scale, decay), {"params": [], "lr_scale": scale, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def make_optimizer(model, recipe):
    """AdamW or Adam over `parameter_groups`; the learning rate is set before every step."""
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[recipe.optimizer]
    return kind(parameter_groups(model, recipe.weight_decay, recipe.layer_decay), lr=0.0, betas=tuple(recipe.betas))


def set_learning_rate(optimizer, lr):
    """Give every group ``lr`` times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
