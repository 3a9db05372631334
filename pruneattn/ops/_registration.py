"""Registration of PyTorch operators: schema, implementation per device, fake implementation and autocast rule."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import torch

from .backend import choose, register

LIBRARY = torch.library.Library("pruneattn", "DEF")
# The devices that run the reference: those of plain PyTorch.
_DEVICES = ("CPU", "CUDA", "MPS", "XPU")


def define(
    schema: str,
    *,
    check: Callable[..., None],
    fake: Callable[..., Any],
    autocast: Literal["cast", "off"] | tuple[str, ...] | None = None,
    only_if_forced: Collection[str] = (),
    **implementations: Callable[..., Any],
) -> Callable[..., Any]:
    """Register an operator as ``torch.ops.pruneattn.<name>`` and return its overload.

    Args:
        schema: Name, arguments and results in PyTorch's schema language.
        check: Called with the arguments of the operator before each run. It raises an error for unsupported arguments.
        fake: Returns empty tensors with the shapes, dtypes and strides of the results.
        autocast: Behavior inside autocast. "cast" casts floating-point inputs to its dtype, like PyTorch's attention. A
            tuple of names casts only these arguments. "off" keeps the dtypes and disables autocast inside the operator.
            None is for operators without arithmetic.
        only_if_forced: Backends that run only if they are forced.
        implementations: Functions of the operator by backend. ``reference`` is required.
    """
    name = schema.split("(")[0]
    register(name, only_if_forced=only_if_forced, **implementations)
    LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    overload = getattr(torch.ops.pruneattn, name).default

    def run(*args: Any) -> Any:
        check(*args)
        return choose(name, args[0].device.type)(*args)

    def checked_fake(*args: Any) -> Any:
        check(*args)
        return fake(*args)

    names = [argument.name for argument in overload._schema.arguments]
    cast: Sequence[str] = names if autocast == "cast" else autocast if isinstance(autocast, tuple) else ()
    places = {names.index(one) for one in cast}
    for device in _DEVICES:
        LIBRARY.impl(name, run, device)
        if autocast:
            LIBRARY.impl(name, _autocast_kernel(overload, device, places), f"Autocast{device}")
    torch.library.register_fake(f"pruneattn::{name}", checked_fake, lib=LIBRARY)
    return overload


def _autocast_kernel(overload: Callable[..., Any], device: str, places: set[int]) -> Callable[..., Any]:
    """Return a function that casts the arguments at these places and calls the operator without autocast."""
    autocast_key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device}"))
    device_type = device.lower()

    def kernel(*args: Any) -> Any:
        if places:
            dtype = torch.get_autocast_dtype(device_type)
            args = tuple(_cast(arg, dtype) if place in places else arg for place, arg in enumerate(args))
        # Autocast inside the operator would round the inputs of the float32 scores.
        with torch._C._ExcludeDispatchKeyGuard(autocast_key):
            return overload(*args)

    return kernel


def _cast(value: Any, dtype: torch.dtype) -> Any:
    # PyTorch's autocast keeps float64, too.
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        return value.to(dtype)
    return value
