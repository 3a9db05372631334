"""Optimization for inference on a CPU: packed weights, and linear layers fused with the steps around them.

``packed.py`` has the layers and ``quantize.py`` the choice of the precision, for models of this package and of other
libraries. ``adapters/optimize.py`` has the public function. For models of this package it calls the function below.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

from torch import nn

from .blocks import Block
from .packed import Int8, PackedLinear, PackedQKV, can_pack, lock, pack, packed_dtype
from .quantize import Inputs, Precision, convert, resolve
from .vit import PrunedViT, own_model

__all__ = ["PackedLinear", "PackedQKV", "can_pack", "optimize_for_inference"]


def optimize_for_inference(
    model: nn.Module, dtype: Precision = None, calibrate: Iterable[Inputs] | None = None
) -> PrunedViT:
    """:func:`pruneattn.optimize_for_inference` for models of :func:`pruneattn.create_model` only."""
    model = own_model(model, "optimize_for_inference")
    chosen = resolve(dtype, model.head.weight.device, packed_dtype(model.blocks))
    model.eval().requires_grad_(False)
    if model.optimized:
        return model
    keep_rates = model.keep_rates
    model.keep_rates = (1.0,) * len(keep_rates)
    try:
        int8 = convert(model, list(model.blocks), chosen, calibrate)
    finally:
        model.keep_rates = keep_rates
    pack_model(model, int8)
    return model


def pack_model(model: PrunedViT, int8: Mapping[nn.Module, Int8]) -> None:
    """Pack the linear layers of the blocks, in place.

    Args:
        model: the model, in the precision of its activations.
        int8: arguments of ``Int8Linear`` for each layer that gets 8-bit weights.
    """
    if not int8 and not can_pack(model.head.weight):
        return
    for i, block in enumerate(cast("Iterable[Block]", model.blocks)):
        pack(block, "attn.qkv", model.pruning.parts if i in model.prune_blocks else ("qkv",), int8)
    lock(model)
    model.optimized = True
