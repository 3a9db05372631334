"""Optimization for inference on a CPU: weights packed for oneDNN, linear layers fused with the steps after them.

The packed layers are those of all models. ``adapters/optimize.py`` uses them in models of other libraries, and has the
public function, which calls the one of this file for models of this package.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NoReturn, TypeVar, cast

import torch
from torch import Tensor, nn

from ..errors import UserError
from .blocks import Block
from .vit import PrunedViT, own_model

_Layer = TypeVar("_Layer")


def optimize_for_inference(model: nn.Module, dtype: torch.dtype | None = None) -> PrunedViT:
    """:func:`pruneattn.optimize_for_inference` for models of :func:`pruneattn.create_model` only."""
    model = own_model(model, "optimize_for_inference")
    check_dtype(dtype, model.head.weight.dtype if model.optimized else None)
    if not model.optimized:
        model.to(dtype=dtype)
    model.eval().requires_grad_(False)
    if can_pack(model.head.weight) and not model.optimized:
        for i, block in enumerate(cast("Iterable[Block]", model.blocks)):
            parts = model.pruning.parts if i in model.prune_blocks else ("qkv",)
            block.attn.qkv = PackedQKV.of(block.attn.qkv, parts)
            block.attn.proj = PackedLinear.of(block.attn.proj)
            block.mlp.fc1 = PackedLinear.of(block.mlp.fc1)
            block.mlp.fc2 = PackedLinear.of(block.mlp.fc2)
        lock(model)
        model.optimized = True
    return model


def check_dtype(dtype: torch.dtype | None, packed: torch.dtype | None) -> None:
    """Check the argument ``dtype`` of :func:`pruneattn.optimize_for_inference`.

    Args:
        dtype: the argument.
        packed: dtype in which the model is packed; None if it is not packed.

    Raises:
        UserError: the dtype is not supported, or the model is packed in another one.
    """
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise UserError(f"optimize_for_inference: dtype must be torch.float32 or torch.bfloat16, got {dtype}")
    if packed is not None and dtype not in (None, packed):
        raise UserError(
            f"optimize_for_inference: the model is already packed in {packed}: load it again to pack it in another "
            "dtype"
        )


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN can pack a weight of this device and dtype on this machine."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and supported())


def _can_pack_layer(layer: Any) -> bool:
    """Whether a layer can be replaced by its packed form: a linear layer that does nothing else.

    A layer with hooks, with parametrized or quantized weights, or of a derived class with its own ``forward`` (LoRA)
    computes more than the product with its weight.
    """
    if getattr(type(layer), "forward", None) is not nn.Linear.forward:
        return False
    weight = layer._parameters.get("weight")  # a parametrized weight is not there
    hooks = (layer._forward_pre_hooks, layer._forward_hooks)
    return type(weight) is nn.Parameter and not any(hooks) and can_pack(weight)


# Changes that a packed model rejects ----------------------------------------------------------------------------------


def _reject_move(*args: Any, **kwargs: Any) -> NoReturn:
    raise UserError("a model that was optimized for inference cannot be moved or cast: move or cast it first")


def _reject_weights(*args: Any, **kwargs: Any) -> NoReturn:
    raise UserError("a model that was optimized for inference accepts no new weights: load them first")


def lock(model: nn.Module) -> None:
    """Make a model and each of its parts with packed layers reject new weights, moving and casting.

    The functions hide the methods of the class, so that the outermost part raises before any part changes. They are
    functions of this module, so that pickle finds them.
    """
    for module in model.modules():
        if any(isinstance(part, PackedLinear) for part in module.modules()):
            vars(module).update(_apply=_reject_move, _load_from_state_dict=_reject_weights)


# Packed layers --------------------------------------------------------------------------------------------------------


class PackedLinear(nn.Module):
    """A linear layer for inference whose weight ``[out, in]`` has oneDNN's fastest memory layout. Copies share it.

    Args:
        weight: ``[out, in]``.
        bias: ``[out]``; None for a layer without bias.
    """

    packed: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("packed", torch.ops.mkldnn._reorder_linear_weight(weight.detach()), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach())

    @classmethod
    def of(cls, layer: _Layer) -> _Layer | PackedLinear:
        """The packed form of a layer. A layer that has none, or that is packed, is returned unchanged."""
        linear: Any = layer
        return cls(linear.weight, linear.bias) if _can_pack_layer(layer) else layer

    def forward(self, x: Tensor) -> Tensor:
        return self._apply_weight(x, "none")

    def gelu(self, x: Tensor) -> Tensor:
        return self._apply_weight(x, "gelu")

    # torch.compile cannot read packed weights: it runs these layers outside of its graphs.

    @torch.compiler.disable
    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        self._check_gradients(x, residual)
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.packed, self.bias, "add")

    @torch.compiler.disable
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

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight  # first, as in nn.Linear
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _apply(self, *args: Any, **kwargs: Any) -> NoReturn:
        _reject_move()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        _reject_weights()

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLinear:
        return self

    def __reduce__(self) -> tuple[type[PackedLinear], tuple[Tensor, Tensor | None]]:
        return type(self), (self.weight, self.bias)


class PackedQKV(nn.Module):
    """The packed projection to queries, keys and values, split into ``parts``, for example ("q", "kv").

    Args:
        weight: ``[3 * dim, in]``.
        bias: ``[3 * dim]``; None for a layer without bias.
        parts: groups that are projected together.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, parts: tuple[str, ...]) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dim = dim = self.out_features // 3
        sizes = [len(part) * dim for part in parts]
        biases = [None] * len(parts) if bias is None else bias.split(sizes)
        rows = zip(parts, weight.split(sizes), biases, strict=True)
        self.packed = nn.ModuleDict({part: PackedLinear(w, b) for part, w, b in rows})

    @classmethod
    def of(cls, layer: _Layer, parts: tuple[str, ...]) -> _Layer | PackedQKV:
        """The packed form of a projection, in these groups. A projection that has none is returned unchanged."""
        linear: Any = layer
        repack = isinstance(layer, PackedQKV) and tuple(layer.packed) != parts
        return cls(linear.weight, linear.bias, parts) if repack or _can_pack_layer(layer) else layer

    @property
    def weight(self) -> Tensor:
        """The weight ``[3 * dim, in]`` before packing."""
        return torch.cat([cast("PackedLinear", part).weight for part in self.packed.values()])

    @property
    def bias(self) -> Tensor | None:
        """The bias ``[3 * dim]``, or None."""
        biases = [cast("PackedLinear", part).bias for part in self.packed.values()]
        return None if biases[0] is None else torch.cat(cast("list[Tensor]", biases))

    def forward(self, x: Tensor) -> Tensor:
        """Queries, keys and values of all rows, ``[B, N, 3 * dim]``."""
        return torch.cat(self.project(x, "qkv"), dim=-1)

    def project(self, x: Tensor, parts: str) -> list[Tensor]:
        """Packed projections, in order, that together hold ``parts``."""
        found = []
        for part, linear in self.packed.items():
            common = "".join(letter for letter in part if letter in parts)
            if common:  # a slice of a packed weight costs as much as the whole
                first = part.index(common) * self.dim
                found.append(linear(x)[..., first : first + len(common) * self.dim])  # [B, N, .. * dim]
        return found

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name in ("weight", "bias"):
            value = getattr(self, name)
            if value is not None:
                destination[prefix + name] = value

    def state_dict(  # type: ignore[override]  # only the form that nn.Module itself calls
        self, *args: Any, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        # The parts are saved as one layer, not one by one.
        destination = {} if destination is None else destination
        self._save_to_state_dict(destination, prefix, keep_vars)
        return destination
