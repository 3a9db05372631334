"""Models with 8-bit weights in this package's own checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import warn_caller
from ..models.optimize import pack_model
from ..models.packed import Int8Linear, PackedLinear, PackedQKV
from ..models.quantize import LayerError, Quantization, cast, float_dtype, why_not_int8
from ..models.vit import PrunedViT
from .state_files import SCALE


def state_of(model: PrunedViT) -> dict[str, Tensor]:
    """The state dict of a model, with its 8-bit weights and their scales instead of dequantized weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of dequantized weights, which are replaced
        state = model.state_dict()
    for name, layer in model.named_modules():
        if isinstance(layer, (PackedLinear, PackedQKV)) and f"{name}.weight" in state and _is_int8(layer):
            state[f"{name}.weight"], state[f"{name}{SCALE}"] = layer.tensors()[:2]
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _is_int8(layer: PackedLinear | PackedQKV) -> bool:
    return (layer.kind if isinstance(layer, PackedQKV) else type(layer)) is Int8Linear


def to_plain(quantization: Quantization) -> dict[str, Any]:
    """A ``Quantization`` as plain values, for JSON."""
    name = str(quantization.dtype).removeprefix("torch.")
    return {"dtype": name, "errors": [list(error) for error in quantization.errors]}


def restore(model: PrunedViT, state: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """Give a model with dequantized weights the 8-bit weights of a state dict, where these are faster.

    Args:
        model: the model, float32, with the weights of ``state``.
        state: result of :func:`state_of`.
        plain: result of :func:`to_plain`.
    """
    if reason := why_not_int8():
        warn_caller(f"8-bit weights would be slower on this machine: {reason}; they are loaded as float32")
        return
    dtype = max(float_dtype(), getattr(torch, plain["dtype"]), key=lambda dtype: dtype.itemsize)
    int8 = {
        model.get_submodule(name.removesuffix(SCALE)): (
            state[name.replace(SCALE, ".weight")],
            scale,
            state.get(name.replace(SCALE, ".bias")),
        )
        for name, scale in state.items()
        if name.endswith(SCALE)
    }
    model.eval().requires_grad_(False)
    cast(model, list(model.blocks), dtype)
    pack_model(model, int8)
    model.quantization = Quantization(dtype, tuple(LayerError(*error) for error in plain["errors"]))
