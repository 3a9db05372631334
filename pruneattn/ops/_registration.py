"""How an op becomes a PyTorch operator: schema, per-device implementation, fake and autocast rule."""

import torch

from .backend import choose, register

LIBRARY = torch.library.Library("pruneattn", "DEF")
# Where plain PyTorch runs, the reference runs too.
_DEVICES = ("CPU", "CUDA", "MPS", "XPU")


def define(schema, *, check, fake, autocast=None, **implementations):
    """Register the op of this schema as ``torch.ops.pruneattn.<name>`` and return its overload.

    Args:
        schema: name, arguments and results in PyTorch's schema language.
        check: called with the op's arguments before each run; raises on what the op does not take.
        fake: returns empty tensors of the result's shapes, dtypes and strides.
        autocast: inside autocast, "cast" casts floating-point inputs to its dtype, as attention in PyTorch does, and a
            tuple of names those arguments alone; "off" takes them as they are and keeps autocast away from the op's
            inside. None: the op has no arithmetic.
        implementations: the op's functions by backend; ``reference`` is required.
    """
    name = schema.split("(")[0]
    register(name, **implementations)
    LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    overload = getattr(torch.ops.pruneattn, name).default

    def run(*args):
        check(*args)
        return choose(name, args[0].device.type)(*args)

    def checked_fake(*args):
        check(*args)
        return fake(*args)

    names = [argument.name for argument in overload._schema.arguments]
    cast = {"cast": names, "off": (), None: ()}.get(autocast, autocast)
    places = {names.index(one) for one in cast}
    for device in _DEVICES:
        LIBRARY.impl(name, run, device)
        if autocast:
            LIBRARY.impl(name, _autocast_kernel(overload, device, places), f"Autocast{device}")
    torch.library.register_fake(f"pruneattn::{name}", checked_fake, lib=LIBRARY)
    return overload


def _autocast_kernel(overload, device, places):
    """Calls the op without autocast, its arguments at these places cast."""
    autocast_key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device}"))
    device_type = device.lower()

    def kernel(*args):
        if places:
            dtype = torch.get_autocast_dtype(device_type)
            args = [_cast(arg, dtype) if place in places else arg for place, arg in enumerate(args)]
        # Without autocast below, or it would round the float32 scores' inputs.
        with torch._C._ExcludeDispatchKeyGuard(autocast_key):
            return overload(*args)

    return kernel


def _cast(value, dtype):
    # float64 is left alone, as PyTorch's own autocast does.
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        return value.to(dtype)
    return value
