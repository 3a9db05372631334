"""Linear layers for inference: packed weights in floating point or in 8 bits, fused with the steps around them.

The layers are those of all models: of this package (``optimize.py``) and of other libraries (``adapters/packing.py``).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import UserError
from ..ops.int8_linear import pack_int8_weight, quantize_rows, unpack_int8_weight

_Layer = TypeVar("_Layer")
Norm = Callable[[Tensor], Tensor]
#: Arguments of `Int8Linear`.
Int8 = tuple[Tensor, Tensor, Tensor | None]
#: Tensors that make a packed layer, each with the output channels first; None for a missing bias.
Tensors = tuple[Tensor | None, ...]
#: Classes of layer norms, by file and name. A derived class may compute something else.
_LAYER_NORMS = {("torch.nn.modules.normalization", "LayerNorm"), ("timm.layers.norm", "LayerNorm")}


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN can pack a weight of this device and dtype on this machine."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and supported())


def is_plain_linear(layer: Any) -> bool:
    """Whether a layer can be replaced by a packed layer: a linear layer that does nothing else.

    A layer with hooks, with parametrized or quantized weights, or of a derived class with its own ``forward`` (LoRA)
    computes more than the product with its weight.
    """
    if getattr(type(layer), "forward", None) is not nn.Linear.forward:
        return False
    weight = layer._parameters.get("weight")  # a parametrized weight is not there
    return type(weight) is nn.Parameter and not _has_hooks(layer)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_pre_hooks or module._forward_hooks)


def plain_linears(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Each plain linear layer within a module, as its owner, its name there, and the layer.

    A module with ``in_features`` is not searched: it wraps a linear layer (LoRA).
    """
    for name, part in module.named_children():
        if is_plain_linear(part):
            yield module, name, part
        elif not hasattr(part, "in_features"):
            yield from plain_linears(part)


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
    def of(cls, layer: _Layer, int8: Int8 | None = None) -> _Layer | PackedLinear:
        """The packed form of a layer. A layer that has none, or that is packed, is returned unchanged.

        Args:
            layer: the layer.
            int8: arguments of :class:`Int8Linear`, for 8-bit weights; None for those of the layer.
        """
        linear: Any = layer
        if int8 is not None:
            return Int8Linear(*int8)
        return cls(linear.weight, linear.bias) if is_plain_linear(layer) and can_pack(linear.weight) else layer

    def forward(self, x: Tensor, norm: Norm | None = None) -> Tensor:
        """The layer's output for ``x``, or for ``norm(x)``."""
        return self._run(x if norm is None else norm(x))

    def gelu(self, x: Tensor, norm: Norm | None = None) -> Tensor:
        """GELU of the layer's output for ``x``, or for ``norm(x)``."""
        return self._run(x if norm is None else norm(x), gelu=True)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """The layer's output plus ``residual``."""
        return self._run(x, residual)

    @torch.compiler.disable  # torch.compile cannot read packed weights: it runs these layers outside of its graphs
    def _run(self, x: Tensor, residual: Tensor | None = None, gelu: bool = False) -> Tensor:
        if residual is not None:
            self._check_gradients(x, residual)
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.packed, self.bias, "add")
        self._check_gradients(x)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "gelu" if gelu else "none", [], "none")

    @staticmethod
    def _check_gradients(*inputs: Tensor | None) -> None:
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
            raise UserError("a model that was optimized for inference has no gradients: load it again to train it")

    @property
    def weight(self) -> Tensor:
        """The weight ``[out, in]`` before packing."""
        return self.packed.to_dense()

    def tensors(self) -> Tensors:
        """Arguments that make this layer again, each with the output channels first."""
        return self.weight, self.bias

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

    def __reduce__(self) -> tuple[type[PackedLinear], Tensors]:
        return type(self), self.tensors()


def quantize_linear(layer: Any) -> Int8:
    """Quantize a linear layer to 8 bits, each output channel with its own scale.

    Returns:
        Arguments of :class:`Int8Linear`.
    """
    q, scale = quantize_rows(layer.weight.detach())
    return q, scale, None if layer.bias is None else layer.bias.detach().float()


class Int8Linear(PackedLinear):
    """A linear layer for inference with 8-bit weights, which quantizes each row of its input: ``ops.int8_linear``.

    Args:
        q: int8 ``[out, in]``.
        scale: scale of each output channel, float32 ``[out]``.
        bias: float32 ``[out]``; None for a layer without bias.
    """

    scale: Tensor

    def __init__(self, q: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = q.shape
        self.register_buffer("packed", pack_int8_weight(q), persistent=False)
        self.register_buffer("scale", scale.contiguous(), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.contiguous())

    # A plain layer norm is part of the same pass.

    def forward(self, x: Tensor, norm: Norm | None = None) -> Tensor:
        return self._run(x, norm=norm) if self._fuses(norm) else super().forward(x, norm)

    def gelu(self, x: Tensor, norm: Norm | None = None) -> Tensor:
        return self._run(x, gelu=True, norm=norm) if self._fuses(norm) else super().gelu(x, norm)

    def _fuses(self, norm: Any) -> bool:
        if (type(norm).__module__, type(norm).__qualname__) not in _LAYER_NORMS or _has_hooks(norm):
            return False
        weights = (norm.weight, norm.bias)
        return all(w is not None and w.shape == (self.in_features,) and w.dtype == torch.float32 for w in weights)

    def _run(self, x: Tensor, residual: Tensor | None = None, gelu: bool = False, norm: Any = None) -> Tensor:
        self._check_gradients(x, residual)
        steps = (None, None) if norm is None else (norm.weight, norm.bias, norm.eps)
        return ops.int8_linear(x, self.packed, self.scale, self.bias, residual, gelu, *steps)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, float32 ``[out, in]``."""
        return self.quantized_weight.float() * self.scale.unsqueeze(-1)

    @property
    def quantized_weight(self) -> Tensor:
        """The weight in 8 bits, int8 ``[out, in]``."""
        return unpack_int8_weight(self.packed, self.out_features, self.in_features)

    def tensors(self) -> Tensors:
        return self.quantized_weight, self.scale, self.bias

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        warn_dequantized()
        super()._save_to_state_dict(destination, prefix, keep_vars)


def warn_dequantized() -> None:
    """Warn that a state dict has other weights than the model was created with."""
    warnings.warn(
        "the model was optimized with dtype=torch.int8: its state_dict has dequantized weights, which are not those "
        "of the original model (save_pretrained of pruneattn and pickle keep the 8-bit weights)",
        stacklevel=3,
    )


def pack(
    block: nn.Module, joint_projection: str, parts: tuple[str, ...], int8: Mapping[nn.Module, Int8] | None = None
) -> None:
    """Replace the linear layers of a block with packed layers, in place, under their names.

    A layer with hooks, with parametrized or quantized weights, within a wrapper (LoRA), or of a derived class with its
    own ``forward`` stays as it is.

    Args:
        block: the block.
        joint_projection: path in the block of the projection to queries, keys and values; empty if there is none.
        parts: groups into which the joint projection is split.
        int8: arguments of :class:`Int8Linear` for each layer that gets 8-bit weights.
    """
    int8 = int8 or {}
    if joint_projection:
        path, _, name = joint_projection.rpartition(".")
        owner = block.get_submodule(path)
        layer = getattr(owner, name)
        setattr(owner, name, PackedQKV.of(layer, parts, int8.get(layer)))
    for owner, name, layer in list(plain_linears(block)):
        setattr(owner, name, PackedLinear.of(layer, int8.get(layer)))


def packed_dtype(module: nn.Module) -> torch.dtype | None:
    """Dtype of the packed weights within a module: ``torch.int8`` if a layer has 8 bits; None without packed layers."""
    layers = [part for part in module.modules() if isinstance(part, PackedLinear)]
    if any(isinstance(layer, Int8Linear) for layer in layers):
        return torch.int8
    return layers[0].packed.dtype if layers else None


class PackedQKV(nn.Module):
    """The packed projection to queries, keys and values, split into ``parts``, for example ("q", "kv").

    Args:
        kind: class of the packed parts.
        tensors: arguments of the class for the whole projection, each with the output channels first.
        parts: groups that are projected together.
    """

    def __init__(self, kind: type[PackedLinear], tensors: Tensors, parts: tuple[str, ...]) -> None:
        super().__init__()
        self.out_features, self.in_features = cast("Tensor", tensors[0]).shape
        self.dim = dim = self.out_features // 3
        sizes = [len(part) * dim for part in parts]
        split = [[None] * len(parts) if tensor is None else tensor.split(sizes) for tensor in tensors]
        self.packed = nn.ModuleDict({part: kind(*rows) for part, *rows in zip(parts, *split, strict=True)})

    @classmethod
    def of(cls, layer: _Layer, parts: tuple[str, ...], int8: Int8 | None = None) -> _Layer | PackedQKV:
        """The packed form of a projection, in these groups. A projection that has none is returned unchanged."""
        linear: Any = layer
        if isinstance(layer, PackedQKV):
            return layer if tuple(layer.packed) == parts else cls(layer.kind, layer.tensors(), parts)
        if int8 is not None:
            return cls(Int8Linear, int8, parts)
        packable = is_plain_linear(layer) and can_pack(linear.weight)
        return cls(PackedLinear, (linear.weight, linear.bias), parts) if packable else layer

    @property
    def _layers(self) -> list[PackedLinear]:
        return cast("list[PackedLinear]", list(self.packed.values()))

    @property
    def kind(self) -> type[PackedLinear]:
        """Class of the packed parts."""
        return type(self._layers[0])

    def tensors(self) -> Tensors:
        """Arguments of ``kind`` for the whole projection."""
        columns = zip(*(layer.tensors() for layer in self._layers), strict=True)
        return tuple(None if rows[0] is None else torch.cat(cast("list[Tensor]", rows)) for rows in columns)

    @property
    def weight(self) -> Tensor:
        """The weight ``[3 * dim, in]`` before packing; dequantized if it has 8 bits."""
        return torch.cat([layer.weight for layer in self._layers])

    @property
    def bias(self) -> Tensor | None:
        """The bias ``[3 * dim]``, or None."""
        biases = [layer.bias for layer in self._layers]
        return None if biases[0] is None else torch.cat(cast("list[Tensor]", biases))

    def forward(self, x: Tensor) -> Tensor:
        """Queries, keys and values of all rows, ``[B, N, 3 * dim]``."""
        return torch.cat(self.project(x, "qkv"), dim=-1)

    def project(self, x: Tensor, parts: str, norm: Norm | None = None) -> list[Tensor]:
        """Packed projections of ``x``, or of ``norm(x)``, in order, that together hold ``parts``."""
        if norm is not None and len(self.packed) > 1:
            x, norm = norm(x), None  # once for all parts
        found = []
        for part, linear in self.packed.items():
            common = "".join(letter for letter in part if letter in parts)
            if common:  # a slice of a packed weight costs as much as the whole
                first = part.index(common) * self.dim
                found.append(linear(x, norm)[..., first : first + len(common) * self.dim])  # [B, N, .. * dim]
        return found

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.kind is Int8Linear:
            warn_dequantized()
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
