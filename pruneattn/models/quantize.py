"""Precision of an optimized model, and the choice of the linear layers that get 8-bit weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import UserError, warn_caller
from ..ops import backend
from .packed import Int8, Int8Linear, can_pack, plain_linears, quantize_linear

#: Precision of ``optimize_for_inference``: a dtype, the fastest one ("auto"), or the model's own (None).
Precision: TypeAlias = torch.dtype | Literal["auto"] | None
#: Inputs of a call of the model: one tensor, positional arguments, or keyword arguments.
Inputs: TypeAlias = Tensor | tuple[Any, ...] | Mapping[str, Any]

# Random ViT-B weights give outputs with an error of 1 %, Whisper's encoder (tiny.en) 0.3 to 2.5 %, its weights 0.8 to
# 1.9 %. The limits are above these, and exclude layers of which 8 bits keep little more than the largest values.
MAX_OUTPUT_ERROR = 0.05
MAX_WEIGHT_ERROR = 0.03
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class LayerError(NamedTuple):
    """Relative error that 8 bits cause in a linear layer, as a root mean square."""

    layer: str
    error: float
    of: str  # "output" (measured on calibration batches) or "weight"

    @property
    def limit(self) -> float:
        """Largest error of a layer that gets 8-bit weights."""
        return MAX_OUTPUT_ERROR if self.of == "output" else MAX_WEIGHT_ERROR


@dataclass(frozen=True)
class Quantization:
    """The linear layers with 8-bit weights in a model, and the others. ``print`` shows a summary.

    Attributes:
        dtype: precision of everything else: ``torch.bfloat16`` or ``torch.float32``.
        errors: error of each linear layer of the blocks. Layers above the limit stay in ``dtype``.
    """

    dtype: torch.dtype
    errors: tuple[LayerError, ...]

    @property
    def kept(self) -> tuple[LayerError, ...]:
        """The layers that stay in floating point."""
        return tuple(one for one in self.errors if not one.error <= one.limit)

    def __str__(self) -> str:
        total, name = len(self.errors), _NAMES[self.dtype]
        lines = [f"8-bit weights in {total - len(self.kept)} of {total} linear layers; {name} elsewhere"]
        for one in self.kept:
            why = f"relative error of its {one.of} {one.error:.1%}, more than {one.limit:.0%}"
            lines.append(f"{one.layer} stays in {name}: {why}")
        return "\n".join(lines)


def why_not_int8() -> str:
    """Why 8-bit weights would be slower than floating point on this machine; empty if they are faster."""
    if reason := backend.why_not("cpu"):
        return reason
    if _capabilities().get("amx_bf16"):
        return "its bfloat16 products with AMX are faster"
    isa = backend._C.cpu_isa()
    return f"there is no kernel for its instructions ({isa})" if isa == "baseline" else ""


def float_dtype() -> torch.dtype:
    """The fastest floating-point precision of a CPU: bfloat16 if it has instructions for products of bfloat16."""
    capabilities = _capabilities()
    fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if fast and can_pack(torch.empty(0, dtype=torch.bfloat16)) else torch.float32


def _capabilities() -> Mapping[str, Any]:
    return torch.cpu.get_capabilities()


def resolve(dtype: Precision, device: torch.device, packed: torch.dtype | None) -> torch.dtype | None:
    """Check the argument ``dtype`` of :func:`pruneattn.optimize_for_inference`, and choose the dtype for "auto".

    ``torch.int8`` becomes the fastest floating-point dtype, with a warning, where 8-bit weights would be slower.

    Args:
        dtype: the argument.
        device: device of the model.
        packed: dtype in which the model is packed; None if it is not packed.

    Raises:
        UserError: the dtype is not supported, or the model is packed in another one.
    """
    supported = (None, "auto", torch.float32, torch.bfloat16, torch.int8)
    if dtype not in supported:
        raise UserError(
            f"optimize_for_inference: dtype must be torch.float32, torch.bfloat16, torch.int8 or 'auto', got {dtype}"
        )
    reason = why_not_int8() if dtype in ("auto", torch.int8) else ""
    if dtype == torch.int8 and device.type != "cpu":
        raise UserError(f"optimize_for_inference: 8-bit weights need a CPU, but the model is on {device}")
    if dtype == torch.int8 and reason:
        dtype = float_dtype()
        if packed is None:
            warn_caller(f"8-bit weights would be slower on this machine: {reason}; using {dtype}")
    if dtype == "auto":
        dtype = packed if packed or device.type != "cpu" else float_dtype() if reason else torch.int8
    if packed is not None and dtype not in (None, packed):
        raise UserError(
            f"optimize_for_inference: the model is already packed in {packed}: load it again to pack it in another "
            "dtype"
        )
    return dtype


def convert(
    model: nn.Module, blocks: Sequence[nn.Module], dtype: torch.dtype | None, calibrate: Iterable[Inputs] | None
) -> dict[nn.Module, Int8]:
    """Cast a model to a result of :func:`resolve`, in place. ``model.quantization`` is set if that is ``torch.int8``.

    Args:
        model: the model, in eval mode, at keep-rate 1.
        blocks: its blocks.
        dtype: the precision.
        calibrate: see :func:`quantize`.

    Returns:
        Arguments of ``Int8Linear`` for each layer that gets 8-bit weights, for ``pack``.
    """
    if dtype != torch.int8:
        model.to(dtype=dtype)
        return {}
    report, int8 = quantize(model, blocks, calibrate)
    cast(model, blocks, report.dtype)
    vars(model)["quantization"] = report
    return int8


def cast(model: nn.Module, blocks: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Cast a model that gets 8-bit weights, in place, except the layer norms of its blocks, which become float32."""
    modules = [module for block in blocks for module in block.modules() if isinstance(module, nn.LayerNorm)]
    exact = [(p, p.detach().to(torch.float32, copy=True)) for norm in modules for p in norm.parameters()]
    model.to(dtype=dtype)
    for parameter, value in exact:
        parameter.data = value


def quantize(
    model: nn.Module, blocks: Iterable[nn.Module], calibrate: Iterable[Inputs] | None
) -> tuple[Quantization, dict[nn.Module, Int8]]:
    """Quantize the linear layers of a model's blocks. The model is not changed.

    Args:
        model: the model, in eval mode, at keep-rate 1.
        blocks: its blocks.
        calibrate: inputs of calls, to measure the error of each layer's output; None to judge by the weights alone.

    Returns:
        The report; and the arguments of ``Int8Linear`` for each layer with 8-bit weights.

    Raises:
        UserError: ``calibrate`` is empty, or a layer's output is not finite.
    """
    chosen = {layer for block in blocks for _, _, layer in plain_linears(block)}
    layers = {module: name for name, module in model.named_modules() if module in chosen}
    int8: dict[nn.Module, Int8] = {layer: quantize_linear(layer) for layer in layers}
    outputs = {} if calibrate is None else _output_errors(model, layers, int8, calibrate)
    errors = {
        layer: LayerError(name, outputs[layer], "output")
        if layer in outputs
        else LayerError(name, _weight_error(layer, int8[layer]), "weight")
        for layer, name in layers.items()
    }
    report = Quantization(float_dtype(), tuple(errors.values()))
    kept = set(report.kept)
    return report, {layer: tensors for layer, tensors in int8.items() if errors[layer] not in kept}


def _weight_error(layer: Any, int8: Int8) -> float:
    weight, (q, scale, _) = layer.weight.detach().float(), int8
    return _ratio((q.float() * scale.unsqueeze(-1) - weight).square().sum(), weight.square().sum())


def _ratio(error: Tensor, size: Tensor) -> float:
    """Root of the quotient of two sums of squares; 0 if there is no error."""
    return float((error / size).sqrt()) if error else 0.0


@torch.no_grad()
def _output_errors(
    model: nn.Module, layers: Mapping[nn.Module, str], int8: Mapping[nn.Module, Int8], calibrate: Iterable[Inputs]
) -> dict[nn.Module, float]:
    """Relative error of the output of each layer that runs."""
    sums: dict[nn.Module, Tensor] = {}  # sums of squares: of the error, and of the output

    def measure(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        error = Int8Linear(*int8[layer])(*inputs).float() - output.float()
        squares = torch.stack([error.double().square().sum(), output.double().square().sum()])
        sums[layer] = sums.get(layer, 0) + squares

    handles = [layer.register_forward_hook(measure) for layer in layers]
    try:
        for inputs in calibrate:
            if isinstance(inputs, Mapping):
                model(**inputs)
            else:
                model(*(inputs if isinstance(inputs, (tuple, list)) else (inputs,)))
    finally:
        for handle in handles:
            handle.remove()
    if not sums:
        raise UserError("calibrate: no linear layer of the blocks ran: pass at least one batch")
    for layer, squares in sums.items():
        if not squares.isfinite().all():
            raise UserError(f"calibrate: the output of {layers[layer]} is not finite: remove the batch that causes it")
    return {layer: _ratio(*squares) for layer, squares in sums.items()}
