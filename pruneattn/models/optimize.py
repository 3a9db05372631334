"""Optimization for inference on a CPU: weights packed for oneDNN, linear layers fused with the steps after them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..errors import UserError
from .blocks import QKV, Block, Linear, LinearLayer, PartialProjection
from .vit import PrunedViT, own_model


def optimize_for_inference(model: nn.Module, dtype: torch.dtype | None = None) -> PrunedViT:
    """Prepare a model for fast inference, in place.

    On a CPU the weights of the blocks are packed once for oneDNN, bias, GELU and residual add are fused into the
    matrix products, and attention runs this package's kernels in every block. Keep-rates can still be changed, and
    ``state_dict``, ``copy.deepcopy`` and ``save_pretrained`` keep working; training, moving, casting, autocast and
    ``torch.compile`` do not. On other devices the weights are not packed: use ``torch.compile`` there.

    Args:
        model: model of :func:`pruneattn.create_model`, with its weights loaded.
        dtype: ``torch.float32`` or ``torch.bfloat16``: precision of weights and activations. None: the model's current
            precision. Inputs may be float32; scores are always float32; logits have this dtype.

    Returns:
        The model, in eval mode, without gradients.

    Raises:
        UserError: not a model of this package, or not a supported dtype.
    """
    model = own_model(model, "optimize_for_inference")
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise UserError(f"optimize_for_inference: dtype must be torch.float32 or torch.bfloat16, got {dtype}")
    if not model.optimized:
        model.to(dtype=dtype)
    elif dtype not in (None, model.head.weight.dtype):
        raise UserError(
            f"optimize_for_inference: the model is already packed in {model.head.weight.dtype}: load it again to "
            "pack it in another dtype"
        )
    model.eval().requires_grad_(False)
    if can_pack(model.head.weight):
        for i, block in enumerate(cast("Iterable[Block]", model.blocks)):
            parts = model.pruning.parts if i in model.prune_blocks else ("qkv",)
            block.attn.qkv = PackedQKV.of(block.attn.qkv, parts)
            block.attn.proj = PackedLinear.of(block.attn.proj)
            block.mlp.fc1 = PackedLinear.of(block.mlp.fc1)
            block.mlp.fc2 = PackedLinear.of(block.mlp.fc2)
        model.optimized = True
    return model


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN can pack a weight of this device and dtype on this machine."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and supported())


class PackedLinear(nn.Module):
    """A linear layer for inference whose weight ``[out, in]`` has oneDNN's fastest memory layout. Copies share it."""

    packed: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.in_features = weight.shape[1]
        self.register_buffer("packed", torch.ops.mkldnn._reorder_linear_weight(weight.detach()), persistent=False)
        self.register_buffer("bias", bias.detach())

    @classmethod
    def of(cls, linear: LinearLayer) -> LinearLayer:
        """The packed form of a linear layer. A packed layer is returned unchanged."""
        return cls(linear.weight, linear.bias) if isinstance(linear, Linear) else linear

    def forward(self, x: Tensor) -> Tensor:
        return self._apply_weight(x, "none")

    def gelu(self, x: Tensor) -> Tensor:
        return self._apply_weight(x, "gelu")

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        self._check_gradients(x, residual)
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.packed, self.bias, "add")

    def _apply_weight(self, x: Tensor, then: Literal["none", "gelu"]) -> Tensor:
        self._check_gradients(x)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, then, [], "none")

    @staticmethod
    def _check_gradients(*inputs: Tensor) -> None:
        if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
            raise UserError("a model that was optimized for inference has no gradients: load it again to train it")

    @property
    def weight(self) -> Tensor:
        """The weight ``[out, in]`` before packing."""
        return self.packed.to_dense()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLinear:
        return self

    def __reduce__(self) -> tuple[type[PackedLinear], tuple[Tensor, Tensor]]:
        return type(self), (self.weight, self.bias)


class PackedQKV(nn.Module):
    """The packed projection to queries, keys and values, split into ``parts``, for example ("q", "kv")."""

    def __init__(self, weight: Tensor, bias: Tensor, parts: tuple[str, ...]) -> None:
        super().__init__()
        self.dim = dim = weight.shape[1]
        sizes = [len(part) * dim for part in parts]
        rows = zip(parts, weight.split(sizes), bias.split(sizes), strict=True)
        self.packed = nn.ModuleDict({part: PackedLinear(w, b) for part, w, b in rows})

    @classmethod
    def of(cls, linear: PartialProjection, parts: tuple[str, ...]) -> PartialProjection:
        """The packed form of a projection. A packed projection is returned unchanged."""
        return cls(linear.weight, linear.bias, parts) if isinstance(linear, QKV) else linear

    def project(self, x: Tensor, parts: str) -> list[Tensor]:
        """Packed projections, in order, that together hold ``parts``."""
        found = []
        for part, linear in self.packed.items():
            common = "".join(letter for letter in part if letter in parts)
            if common:  # a slice of a packed weight costs as much as the whole
                first = part.index(common) * self.dim
                found.append(linear(x)[..., first : first + len(common) * self.dim])  # [B, N, .. * C]
        return found

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name in ("weight", "bias"):
            destination[prefix + name] = torch.cat([getattr(part, name) for part in self.packed.values()])

    def state_dict(  # type: ignore[override]  # only the form that nn.Module itself calls
        self, *args: Any, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        # The parts are saved as one layer, not one by one.
        destination = {} if destination is None else destination
        self._save_to_state_dict(destination, prefix, keep_vars)
        return destination
