"""Which implementation of an op runs.

Every op has its ``reference`` in plain PyTorch, which runs on any device, and kernels that are faster where they exist.
The choice is made each time an op runs, so it also holds inside graphs that were compiled or exported before:

1. ``with use_backend(name):`` around the call,
2. else the environment variable ``PRUNEATTN_BACKEND`` (read once, when the first op runs),
3. else the best kernel that is usable for the tensor's device.

A forced backend runs where it has a kernel for the op and the tensor's device; everything else runs the reference.
Forcing a backend that cannot be used on this machine at all is an error that says why.
"""

import functools
import os
import threading
from collections.abc import Mapping
from importlib.util import find_spec
from typing import NamedTuple

import torch  # before _C, which then shares PyTorch's OpenMP threads

from ..errors import UserError

try:
    from .. import _C
except ImportError as error:
    _C = None
    _WHY_NO_C = (
        f"the compiled part pruneattn._C cannot be imported ({error}); "
        "'pip install -e .' in a clone, or 'pip install .', builds it and needs a C++ compiler"
    )

ENVIRONMENT = "PRUNEATTN_BACKEND"
ISA_ENVIRONMENT = "PRUNEATTN_CPU_ISA"  # instruction set of the CPU's attention kernels; by default the best there is
NAMES = ("reference", "cpu", "cuda", "triton")
_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's, which runs kernels on the CPU, to test them
#: The device type each backend's kernels run on.
DEVICES = {"cpu": "cpu", "cuda": "cuda", "triton": "cpu" if _INTERPRETER else "cuda"}
_FASTEST_FIRST = ("cuda", "triton", "cpu")

_kernels = {}  # op -> {backend: function}, filled by pruneattn.ops
_open = []  # the use_backend contexts that are open, innermost last; changed under the lock
_lock = threading.Lock()
_forced = None  # the name of the innermost


def register(op, **functions):
    """Add the implementations of ``op``, by backend: ``register("select_tokens", reference=..., cpu=...)``."""
    _kernels.setdefault(op, {}).update(functions)
    _resolve.cache_clear()
    why_not.cache_clear()


def choose(op, device_type):
    """The function that runs ``op`` on tensors of this device type now."""
    return _resolve(op, device_type, _forced or _from_environment())


def stands_in(name, device_type):
    """Whether this backend's kernel may run where the chosen one does not take the input: usable, and none is forced."""
    return not (_forced or _from_environment()) and DEVICES.get(name) == device_type and not why_not(name)


def references():
    """Dict of every op's overload (``torch.ops.pruneattn.NAME.default``) and its reference in plain PyTorch."""
    return {getattr(torch.ops.pruneattn, op).default: functions["reference"] for op, functions in _kernels.items()}


def launch(kernel, tensor, *args):
    """Call a compiled kernel where ``tensor`` is: on the GPU's current stream, or on as many CPU threads as PyTorch."""
    if tensor.is_cuda:
        device = tensor.device.index
        getattr(_C, f"cuda_{kernel}")(*args, device, torch.cuda.current_stream(device).cuda_stream)
    else:
        getattr(_C, f"cpu_{kernel}")(*args, torch.get_num_threads())


class use_backend:
    """Force a backend for the ops that run inside the ``with`` block: ``with use_backend("reference"): ...``.

    It holds for the whole process, not for one thread only, because the backward pass runs in autograd's threads.
    Put it around the call of a compiled function, not inside.

    Args:
        name: "reference", "cpu", "cuda" or "triton".

    Raises:
        UserError: the name is unknown, or the backend cannot be used on this machine (the message says why).
    """

    def __init__(self, name):
        if torch.compiler.is_compiling():
            raise RuntimeError("use_backend acts when ops run: put it around the compiled function, not inside")
        _check_usable(name, "use_backend")
        self.name = name

    def __enter__(self):
        self._change(_open.append)
        return self

    def __exit__(self, *exception):
        # This one, not the last one: contexts of two threads may close in any order.
        self._change(_open.remove)

    def _change(self, change):
        global _forced
        with _lock:
            change(self)
            _forced = _open[-1].name if _open else None


class Status(NamedTuple):
    """One backend of one op: ``state`` is "used", "available", "unusable" or "no kernel"; ``reason`` is why, or ""."""

    state: str
    reason: str


class Backends(Mapping):
    """What :func:`backends` returns: ``table[op][backend]`` is a :class:`Status`; printed, it is a table."""

    def __init__(self, rows, forced):
        self._rows = rows
        self.forced = forced  # the name of the forced backend, or None

    def __getitem__(self, op):
        return self._rows[op]

    def __iter__(self):
        return iter(self._rows)

    def __len__(self):
        return len(self._rows)

    def __repr__(self):
        width = max(map(len, self._rows))
        lines = [f"{'op':<{width}}  " + "  ".join(f"{name:<9}" for name in NAMES)]
        for op, row in self._rows.items():
            lines.append(f"{op:<{width}}  " + "  ".join(f"{row[name].state:<9}" for name in NAMES))
        notes = [f"{name}: {why_not(name)}" for name in NAMES if why_not(name)]
        if not why_not("cpu"):
            notes.append(f"cpu: attention kernels for {_C.cpu_isa()}, of {', '.join(_C.cpu_isas())}")
        notes.append("an op without a usable kernel runs the reference")
        if self.forced:
            notes.append(f"forced: {self.forced}")
        return "\n".join(line.rstrip() for line in [*lines, "", *notes])


def backends():
    """What each op can run on here, what it runs on now, and why the rest is not usable.

    Returns:
        :class:`Backends`, a mapping ``op -> backend -> Status(state, reason)`` that prints as a table. "used" is what
        runs now on at least one kind of device of this machine.
    """
    forced = _forced or _from_environment()
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    rows = {}
    for op, functions in _kernels.items():
        used = [_resolve(op, device, forced) for device in devices]
        rows[op] = {name: _status(op, name, functions, used, devices) for name in NAMES}
    return Backends(rows, forced)


def _status(op, name, functions, used, devices):
    if name not in functions:
        return Status("no kernel", f"{op} has no kernel for it yet")
    if why_not(name):
        return Status("unusable", why_not(name))
    runs = any(f is functions[name] and DEVICES.get(name, device) == device for f, device in zip(used, devices))
    return Status("used" if runs else "available", "")


@functools.cache
def why_not(name):
    """Why the backend cannot be used on this machine; empty if it can."""
    if not any(name in functions for functions in _kernels.values()):
        return "no op has a kernel for it yet"
    if name in ("cpu", "cuda") and _C is None:
        return _WHY_NO_C
    if name == "cuda" and not _C.build_info()["cuda"]:
        return f"pruneattn._C was built without CUDA: {_C.build_info()['cuda_reason']}"
    if name == "triton" and find_spec("triton") is None:
        return "Triton is not installed; it comes with PyTorch's builds for GPUs"
    if DEVICES.get(name) == "cuda" and not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    if (
        name == "triton"
        and torch.version.hip is None
        and not _INTERPRETER
        and torch.cuda.get_device_capability() < (8, 0)
    ):
        return "the Triton kernels need a GPU of compute capability 8.0 or newer"
    if name == "cuda":
        return _why_not_this_gpu(_C.build_info()["cuda_architectures"].split(";"), torch.cuda.get_device_capability())
    return ""


def _why_not_this_gpu(architectures, capability):
    gpu = 10 * capability[0] + capability[1]
    if any(_runs_on(name, gpu) for name in architectures):
        return ""
    return (
        f"pruneattn._C was built for sm_{', sm_'.join(architectures)} and this GPU is sm_{gpu}; "
        f"build it again with PRUNEATTN_CUDA_ARCHS={gpu}"
    )


def _runs_on(architecture, gpu):
    built_for = int(architecture.rstrip("af"))
    if architecture.endswith("a"):  # this one alone
        return gpu == built_for
    if architecture.endswith("f"):  # later ones of its family
        return built_for <= gpu < 10 * (built_for // 10 + 1)
    return gpu >= built_for  # all later ones, through the PTX it carries


@functools.cache
def _resolve(op, device_type, forced):
    functions = _kernels[op]
    for name in _preferred(functions) if forced is None else (forced,):
        if name in functions and DEVICES.get(name) == device_type and not why_not(name):
            if name == "cpu":
                _use_isa_of_environment()
            return functions[name]
    return functions["reference"]


def _preferred(functions):
    """Backends that are chosen unless one is forced, in this order."""
    waiting = {name for name, function in functions.items() if getattr(function, "only_if_forced", False)}
    return [name for name in _FASTEST_FIRST if name not in waiting and not (name == "triton" and _INTERPRETER)]


@functools.cache
def _use_isa_of_environment():
    name = os.environ.get(ISA_ENVIRONMENT)
    try:
        if name:
            _C.cpu_use_isa(name)
    except ValueError as error:
        raise UserError(f"environment variable {ISA_ENVIRONMENT}: {error}") from None


@functools.cache
def _from_environment():
    name = os.environ.get(ENVIRONMENT) or None
    if name is not None:
        _check_usable(name, f"environment variable {ENVIRONMENT}")
    return name


def _check_usable(name, where):
    if name not in NAMES:
        raise UserError(f"{where}: unknown backend {name!r}; choose one of {', '.join(NAMES)}")
    if why_not(name):
        raise UserError(f"{where}: backend {name!r} cannot be used here: {why_not(name)}")
