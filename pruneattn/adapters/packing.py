"""Packed linear layers in the blocks of other libraries, fused with the steps around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..models.packed import PackedLinear


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


def activate(linear: nn.Module, activation: Any, x: Tensor, norm: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """``activation(linear(norm(x)))``, in fewer steps if the layer is packed and the activation is the exact GELU."""
    if isinstance(linear, PackedLinear) and _is_gelu(activation):
        return linear.gelu(x, norm)
    return activation(linear(x if norm is None else norm(x)))


def _is_gelu(activation: Any) -> bool:
    if isinstance(activation, nn.GELU):
        return activation.approximate == "none"
    return getattr(activation, "act", activation) is F.gelu  # GELUActivation of transformers holds the function


def has_parts(module: nn.Module, required: set[str], optional: set[str]) -> bool:
    """Whether a module has all of the required parts, and none besides the optional ones."""
    found = {name for name, _ in module.named_children()}
    return required <= found <= required | optional
