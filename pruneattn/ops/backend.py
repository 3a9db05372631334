"""Choice of the implementation that runs an op.

Every op has a ``reference`` in plain PyTorch, which runs on any device, and faster kernels for some devices. Each call
of an op makes the choice again, also inside graphs that were compiled or exported before:

1. the backend of ``with use_backend(name):`` around the call,
2. else the backend of the environment variable ``PRUNEATTN_BACKEND`` (read once, when the first op runs),
3. else the fastest usable kernel for the device of the tensor.

A forced backend runs the ops that it has a kernel for, on its device type; the reference runs everything else. Forcing
a backend that this machine cannot use raises an error that says why.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch  # before _C, which then shares PyTorch's OpenMP threads

from ..errors import UserError

try:
    from .. import _C as _C

    _WHY_NO_C = ""
except ImportError as error:
    _C = None  # type: ignore[assignment]  # the extension is optional
    _WHY_NO_C = (
        f"the compiled extension pruneattn._C cannot be imported ({error}); "
        "'pip install -e .' in a clone, or 'pip install .', builds it with a C++ compiler"
    )

ENVIRONMENT = "PRUNEATTN_BACKEND"
ISA_ENVIRONMENT = "PRUNEATTN_CPU_ISA"  # instruction set of the CPU's attention kernels; by default the best one
NAMES = ("reference", "cpu", "cuda", "triton")
_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's interpreter runs kernels on the CPU, for tests
#: The device type that the kernels of each backend run on.
DEVICES = {"cpu": "cpu", "cuda": "cuda", "triton": "cpu" if _INTERPRETER else "cuda"}
_FASTEST_FIRST = ("cuda", "triton", "cpu")

Implementation = Callable[..., Any]

_kernels: dict[str, dict[str, Implementation]] = {}  # op -> {backend: function}, filled by the files of pruneattn.ops
_only_if_forced: dict[str, frozenset[str]] = {}  # op -> backends
_open: list[use_backend] = []  # the open use_backend contexts, innermost last; changed under the lock
_lock = threading.Lock()
_forced: str | None = None  # the name of the innermost context


def register(op: str, *, only_if_forced: Collection[str] = (), **functions: Implementation) -> None:
    """Add the implementations of ``op``, by backend: ``register("select_tokens", reference=..., cpu=...)``.

    The backends in ``only_if_forced`` are never chosen automatically for this op.
    """
    _kernels.setdefault(op, {}).update(functions)
    _only_if_forced[op] = frozenset(only_if_forced)
    _resolve.cache_clear()
    why_not.cache_clear()


def choose(op: str, device_type: str) -> Implementation:
    """Return the function that currently runs ``op`` on tensors of this device type."""
    return _resolve(op, device_type, _forced or _from_environment())


def stands_in(name: str, device_type: str) -> bool:
    """Return whether a backend may replace a kernel that does not support the input: usable, and no backend forced."""
    return not (_forced or _from_environment()) and DEVICES.get(name) == device_type and not why_not(name)


def references() -> dict[Any, Implementation]:
    """Return each op's overload (``torch.ops.pruneattn.NAME.default``) with its reference in plain PyTorch."""
    return {getattr(torch.ops.pruneattn, op).default: functions["reference"] for op, functions in _kernels.items()}


def launch(kernel: str, tensor: torch.Tensor, *args: Any) -> None:
    """Call a compiled kernel on the device of ``tensor``.

    A CUDA kernel runs on the current stream of the device, a CPU kernel on as many threads as PyTorch uses.
    """
    if tensor.is_cuda:
        device = tensor.device.index
        getattr(_C, f"cuda_{kernel}")(*args, device, torch.cuda.current_stream(device).cuda_stream)
    else:
        getattr(_C, f"cpu_{kernel}")(*args, torch.get_num_threads())


class use_backend:
    """Force a backend for the ops that run inside the ``with`` block: ``with use_backend("reference"): ...``.

    The choice applies to the whole process, because autograd runs the backward pass in its own threads. Put the context
    around the call of a compiled function, not inside it.

    Args:
        name: "reference", "cpu", "cuda" or "triton".

    Raises:
        UserError: The name is unknown, or this machine cannot use the backend (the message says why).
    """

    def __init__(self, name: str) -> None:
        if torch.compiler.is_compiling():
            raise RuntimeError("use_backend acts when ops run: put it around the compiled function, not inside")
        _check_usable(name, "use_backend")
        self.name = name

    def __enter__(self) -> use_backend:
        self._change(_open.append)
        return self

    def __exit__(self, *exception: object) -> None:
        # Remove this context, not the innermost one: contexts of two threads may close in any order.
        self._change(_open.remove)

    def _change(self, change: Callable[[use_backend], None]) -> None:
        global _forced
        with _lock:
            change(self)
            _forced = _open[-1].name if _open else None


class Status(NamedTuple):
    """State of a backend for an op: "used", "available", "unusable" or "no kernel"; ``reason`` is why, or empty."""

    state: str
    reason: str


class Backends(Mapping[str, Mapping[str, Status]]):
    """The result of :func:`backends`: ``table[op][backend]`` is a :class:`Status`. Its ``repr`` is a table."""

    def __init__(self, rows: Mapping[str, Mapping[str, Status]], forced: str | None) -> None:
        self._rows = rows
        self.forced = forced  # the name of the forced backend, or None

    def __getitem__(self, op: str) -> Mapping[str, Status]:
        return self._rows[op]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        width = max(map(len, self._rows))
        lines = [f"{'op':<{width}}  " + "  ".join(f"{name:<9}" for name in NAMES)]
        for op, row in self._rows.items():
            lines.append(f"{op:<{width}}  " + "  ".join(f"{row[name].state:<9}" for name in NAMES))
        notes = [f"{name}: {why_not(name)}" for name in NAMES if why_not(name)]
        if not why_not("cpu"):
            notes.append(f"cpu: attention kernels use {_C.cpu_isa()}; available: {', '.join(_C.cpu_isas())}")
        notes.append("an op without a usable kernel runs the reference")
        if self.forced:
            notes.append(f"forced: {self.forced}")
        return "\n".join(line.rstrip() for line in [*lines, "", *notes])


def backends() -> Backends:
    """Return the state of every backend for every op on this machine, and why backends are not usable.

    Returns:
        A mapping ``op -> backend -> Status(state, reason)`` that prints as a table. A backend is "used" if it currently
        runs the op on at least one device type of this machine.
    """
    forced = _forced or _from_environment()
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    rows = {}
    for op, functions in sorted(_kernels.items()):
        used = [_resolve(op, device, forced) for device in devices]
        rows[op] = {name: _status(op, name, functions, used, devices) for name in NAMES}
    return Backends(rows, forced)


def _status(
    op: str,
    name: str,
    functions: Mapping[str, Implementation],
    used: Sequence[Implementation],
    devices: Sequence[str],
) -> Status:
    if name not in functions:
        return Status("no kernel", f"{op} has no kernel for it yet")
    if why_not(name):
        return Status("unusable", why_not(name))
    runs = any(
        f is functions[name] and DEVICES.get(name, device) == device for f, device in zip(used, devices, strict=True)
    )
    return Status("used" if runs else "available", "")


@functools.cache
def why_not(name: str) -> str:
    """Return why this machine cannot use the backend; empty if it can."""
    if not any(name in functions for functions in _kernels.values()):
        return "no op has a kernel for it yet"
    if name in ("cpu", "cuda") and _WHY_NO_C:
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


def _why_not_this_gpu(architectures: Sequence[str], capability: tuple[int, int]) -> str:
    gpu = 10 * capability[0] + capability[1]
    if any(_runs_on(name, gpu) for name in architectures):
        return ""
    return (
        f"pruneattn._C was built for sm_{', sm_'.join(architectures)} and this GPU is sm_{gpu}; "
        f"build it again with PRUNEATTN_CUDA_ARCHS={gpu}"
    )


def _runs_on(architecture: str, gpu: int) -> bool:
    built_for = int(architecture.rstrip("af"))
    if architecture.endswith("a"):  # this architecture only
        return gpu == built_for
    if architecture.endswith("f"):  # later architectures of its family
        return built_for <= gpu < 10 * (built_for // 10 + 1)
    return gpu >= built_for  # all later architectures, through the embedded PTX


@functools.cache
def _resolve(op: str, device_type: str, forced: str | None) -> Implementation:
    functions = _kernels[op]
    for name in _preferred(op) if forced is None else (forced,):
        if name in functions and DEVICES.get(name) == device_type and not why_not(name):
            if name == "cpu":
                _use_isa_of_environment()
            return functions[name]
    return functions["reference"]


def _preferred(op: str) -> list[str]:
    """Return the backends that may be chosen automatically, in order of preference."""
    waiting = _only_if_forced.get(op, ())
    return [name for name in _FASTEST_FIRST if name not in waiting and not (name == "triton" and _INTERPRETER)]


@functools.cache
def _use_isa_of_environment() -> None:
    name = os.environ.get(ISA_ENVIRONMENT)
    try:
        if name:
            _C.cpu_use_isa(name)
    except ValueError as error:
        raise UserError(f"environment variable {ISA_ENVIRONMENT}: {error}") from None


@functools.cache
def _from_environment() -> str | None:
    name = os.environ.get(ENVIRONMENT) or None
    if name is not None:
        _check_usable(name, f"environment variable {ENVIRONMENT}")
    return name


def _check_usable(name: str, where: str) -> None:
    if name not in NAMES:
        raise UserError(f"{where}: unknown backend {name!r}; choose one of {', '.join(NAMES)}")
    if why_not(name):
        raise UserError(f"{where}: backend {name!r} cannot be used here: {why_not(name)}")
