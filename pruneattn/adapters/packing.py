"""Packed linear layers in the blocks of other libraries, and the steps after a layer that they are fused with."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..models.optimize import PackedLinear, PackedQKV


def pack(block: nn.Module, joint_projection: str, parts: tuple[str, ...]) -> None:
    """Replace the linear layers of a block with packed layers, in place, under their names.

    A layer with hooks, with parametrized or quantized weights, or of a derived class with its own ``forward`` stays as
    it is. A module with ``in_features`` stays as it is with all of its parts: it wraps a linear layer (LoRA).

    Args:
        block: the block.
        joint_projection: see :class:`~pruneattn.adapters.BlockView`.
        parts: groups into which the joint projection is split.
    """
    if joint_projection:
        path, _, name = joint_projection.rpartition(".")
        owner = block.get_submodule(path)
        setattr(owner, name, PackedQKV.of(getattr(owner, name), parts))
    _pack_parts(block)


def _pack_parts(module: nn.Module) -> None:
    for name, part in list(module.named_children()):
        packed = PackedLinear.of(part)
        if packed is not part:
            setattr(module, name, packed)
        elif not hasattr(part, "in_features"):
            _pack_parts(part)


def add(x: Tensor, linear: nn.Module, y: Tensor, scale: nn.Module | None = None) -> Tensor:
    """``x + scale(linear(y))``, in one step if the layer is packed and there is no scale.

    Args:
        x: the residual ``[B, M, C]``.
        linear: the layer.
        y: its input.
        scale: layer scale; None or ``nn.Identity`` if there is none.
    """
    if scale is not None and not isinstance(scale, nn.Identity):
        return x + scale(linear(y))
    return linear.add(y, x) if isinstance(linear, PackedLinear) else x + linear(y)


def activate(linear: nn.Module, activation: Any, y: Tensor) -> Tensor:
    """``activation(linear(y))``, in one step if the layer is packed and the activation is the exact GELU."""
    return linear.gelu(y) if isinstance(linear, PackedLinear) and _is_gelu(activation) else activation(linear(y))


def _is_gelu(activation: Any) -> bool:
    if isinstance(activation, nn.GELU):
        return activation.approximate == "none"
    return getattr(activation, "act", activation) is F.gelu  # GELUActivation of transformers holds the function


def has_parts(module: nn.Module, required: set[str], optional: set[str]) -> bool:
    """Whether a module has all of the required parts, and none besides the optional ones."""
    found = {name for name, _ in module.named_children()}
    return required <= found <= required | optional
