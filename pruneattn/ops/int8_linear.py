"""Linear layers with 8-bit weights, whose inputs are quantized to 8 bits on the fly, each row with its own scale."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from ..errors import UserError
from ._attention import CPU_DTYPES
from ._checks import check_device, check_dtype, check_shape
from ._layout import together
from ._registration import LIBRARY, define
from .backend import launch

PANEL = 32  #: output channels that are next to each other in a packed weight
GROUP = 16  #: input channels are padded to a multiple of this
MAX_IN = 131072  #: the sum of this many products fits into 32 bits
OFFSET = 128  #: of packed weights, which are unsigned
SMALLEST = 2.0**-100  #: a row without larger magnitudes counts as zero
EPSILON = 1e-5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each row to 8 bits: ``q = round(x * (127 / max|x|))``, where ties go to the even number.

    A row whose magnitudes are all below 2**-100 becomes zeros with the scale 0. A row with NaN or Inf becomes zeros
    with the scale NaN. The numbers are computed in float32.

    Args:
        x: ``[..., K]``, with a floating-point dtype.

    Returns:
        ``q`` int8 ``[..., K]`` from -127 to 127, and the scales ``max|x| / 127``, float32 ``[...]``. ``x`` is about
        ``q * scale``.
    """
    x = x.float()
    top = x.abs().amax(-1)  # NaN for a row with NaN
    usable = top.isfinite() & (top >= SMALLEST)
    factor = torch.where(usable, torch.full_like(top, 127) / top, 0)  # 127 / top is a rounded reciprocal, times 127
    q = torch.where(usable.unsqueeze(-1), x * factor.unsqueeze(-1), 0).round().to(torch.int8)
    return q, torch.where(usable, top / 127, torch.where(top.isfinite(), 0, torch.nan))


def pack_int8_weight(weight: torch.Tensor) -> torch.Tensor:
    """Pack an int8 weight ``[N, K]`` for :func:`int8_linear`.

    Returns:
        uint8 ``[ceil(N / 32), ceil(K / 16) * 4, 32, 4]``: 128 more than the weight, padded with 128.
    """
    check_shape("weight", weight, "NK")
    check_dtype("weight", weight, (torch.int8,))
    out, channels = weight.shape
    unsigned = (weight.to(torch.int16) + OFFSET).to(torch.uint8)
    padded = F.pad(unsigned, (0, -channels % GROUP, 0, -out % PANEL), value=OFFSET)
    return padded.view(padded.shape[0] // PANEL, PANEL, -1, 4).transpose(1, 2).contiguous()


def unpack_int8_weight(packed: torch.Tensor, out_features: int, in_features: int) -> torch.Tensor:
    """Restore the int8 weight ``[N, K]`` that :func:`pack_int8_weight` packed."""
    check_shape("packed", packed, ("panels", "quads", "32", "4"), _packed_shape(out_features, in_features))
    rows = packed.transpose(1, 2).flatten(2).flatten(0, 1)[:out_features, :in_features]
    return (rows.to(torch.int16) - OFFSET).to(torch.int8)


def _packed_shape(out: int, channels: int) -> tuple[int, int, int, int]:
    return (out + PANEL - 1) // PANEL, (channels + GROUP - 1) // GROUP * (GROUP // 4), PANEL, 4


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gelu: bool = False,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    epsilon: float = EPSILON,
) -> torch.Tensor:
    """Define :func:`int8_linear` in plain PyTorch."""
    rows = x.float()
    if norm_weight is not None:
        rows = F.layer_norm(rows, rows.shape[-1:], norm_weight, norm_bias, epsilon)
    q, row_scale = quantize_rows(rows)
    # Sums of integers are exact in float64.
    sums = q.double() @ unpack_int8_weight(weight, scale.shape[0], x.shape[-1]).double().T
    y = sums.float() * scale * row_scale.unsqueeze(-1)
    if bias is not None:
        y = y + bias
    if gelu:
        y = F.gelu(y)
    if residual is not None:
        y = residual.float() + y
    return y.to(x.dtype).contiguous()


def int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gelu: bool = False,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    epsilon: float = EPSILON,
) -> torch.Tensor:
    """Apply a linear layer with 8-bit weights, and the steps before and after it, in one pass.

    The steps are: layer norm (if ``norm_weight`` is given), quantization of each row by :func:`quantize_rows`, product,
    scales, bias, GELU (if ``gelu``), residual add, rounding to the dtype of ``x``. The sums of the product are exact.
    All other steps are computed in float32. A row with NaN or Inf gives a row of NaN. It does not change other rows. A
    row of zeros gives the bias. Results do not depend on the number of threads or on other rows. Not differentiable.

    Args:
        x: Rows ``[..., K]``, float32, bfloat16 or float16, with any strides.
        weight: Result of :func:`pack_int8_weight` for a weight ``[N, K]``. K is at most 131072.
        scale: Scale of each output channel, float32 ``[N]``.
        bias: float32 ``[N]``, or None.
        residual: Added to the result: ``[..., N]`` with the dtype of ``x`` and any strides, or None.
        gelu: Apply GELU (the exact form, not the tanh form) before the residual add.
        norm_weight: Weight of a layer norm before the quantization, float32 ``[K]``, or None.
        norm_bias: Bias of the layer norm, float32 ``[K]``. Required with ``norm_weight``.
        epsilon: Epsilon of the layer norm.

    Returns:
        ``[..., N]`` with the dtype of ``x``, contiguous.

    Raises:
        TypeError: An argument has another dtype.
        ValueError: An argument has another shape or device.
        UserError: An argument needs a gradient.
    """
    return _int8_linear(x, weight, scale, bias, residual, gelu, norm_weight, norm_bias, epsilon)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gelu: bool = False,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    epsilon: float = EPSILON,
) -> None:
    check_dtype("x", x, DTYPES)
    if x.dim() == 0 or not 1 <= x.shape[-1] <= MAX_IN:
        raise ValueError(f"x: expected shape [..., K] with K from 1 to {MAX_IN}, got {list(x.shape)}")
    check_shape("scale", scale, "N")
    if scale.shape[0] == 0:
        raise ValueError("scale: expected at least one output channel, got shape [0]")
    channels, out = x.shape[-1], scale.shape[0]
    check_shape("weight", weight, ("panels", "quads", "32", "4"), _packed_shape(out, channels))
    check_dtype("weight", weight, (torch.uint8,))
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("norm_weight and norm_bias: expected both or neither, got one")
    for name, tensor, size, letter in (
        ("scale", scale, out, "N"),
        ("bias", bias, out, "N"),
        ("norm_weight", norm_weight, channels, "K"),
        ("norm_bias", norm_bias, channels, "K"),
    ):
        if tensor is not None:
            check_shape(name, tensor, letter, (size,))
            check_dtype(name, tensor, (torch.float32,))
            check_device(name, tensor, "x", x)
    check_device("weight", weight, "x", x)
    if residual is not None:
        check_shape("residual", residual, ["..."] * (x.dim() - 1) + ["N"], (*x.shape[:-1], out))
        if residual.dtype != x.dtype:
            raise TypeError(f"residual: expected dtype {x.dtype}, the dtype of x, got {residual.dtype}")
        check_device("residual", residual, "x", x)


def _fake(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


def _rows_of(x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int, int]]:
    """Return ``x`` ``[B, N, C]`` or a copy of it, and its address, rows per batch, batch stride and row stride."""
    if x.dim() != 3:
        x = x.reshape(-1, *x.shape[-2:]) if x.dim() > 1 else x.view(1, 1, -1)
    x = together(x)
    return x, (x.data_ptr(), x.shape[1], x.stride(0), x.stride(1))


def _cpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gelu: bool = False,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    epsilon: float = EPSILON,
) -> torch.Tensor:
    if x.dtype == torch.float16:
        more = None if residual is None else residual.float()
        return _cpu(x.float(), weight, scale, bias, more, gelu, norm_weight, norm_bias, epsilon).half()
    y = _fake(x, weight, scale)
    if y.numel() == 0:
        return y
    rows = x.numel() // x.shape[-1]
    x, place = _rows_of(x)
    residual, residual_place = (None, (0, 1, 0, 0)) if residual is None else _rows_of(residual)
    parameters = [None if p is None else p.contiguous() for p in (weight, scale, bias, norm_weight, norm_bias)]
    pointers = [0 if p is None else p.data_ptr() for p in parameters]
    shape = (rows, x.shape[-1], scale.shape[0])
    launch("int8_linear", x, CPU_DTYPES[x.dtype], *shape, place, residual_place, y.data_ptr(), *pointers, epsilon, gelu)
    return y


_int8_linear = define(
    "int8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None, Tensor? residual=None, bool gelu=False, "
    "Tensor? norm_weight=None, Tensor? norm_bias=None, float epsilon=1e-5) -> Tensor",
    check=_check,
    fake=_fake,
    autocast="off",
    reference=reference,
    cpu=_cpu,
)


def _no_gradients(*_: Any, **__: Any) -> None:
    raise UserError("int8_linear has no gradients: call it inside torch.no_grad() or torch.inference_mode()")


# setup_context runs in the forward pass, if an argument needs a gradient.
torch.library.register_autograd("pruneattn::int8_linear", _no_gradients, setup_context=_no_gradients, lib=LIBRARY)


@register_flop_formula(torch.ops.pruneattn.int8_linear)
def _flops(x: torch.Size, weight: torch.Size, scale: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * x.numel() * scale[0]
