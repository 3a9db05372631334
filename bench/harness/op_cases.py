"""Inputs, providers and checks that the benchmarks of the ops share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch

from bench.harness.case import Case, Provider, Work
from bench.harness.guards import check_close, check_same
from pruneattn import backends, use_backend
from pruneattn.ops.backend import _C, DEVICES, NAMES
from pruneattn.runtime.timing import attention_kernels

HEADS, HEAD_DIM, DIM = 12, 64, 768

#: Ops with a CPU kernel for each instruction set.
BY_INSTRUCTION_SET = (
    "attention",
    "column_mean_attention",
    "cls_scores",
    "cls_prune_tokens",
    "pruned_attention",
    "int8_linear",
)

#: Largest difference of an op's result from the float32 reference, relative to the largest value.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def extra_tokens(case: Case) -> int:
    """Number of tokens that are not patches: 1 of the 65, 257 or 513 of AudioMAE, 2 of the 66, 258 or 514 of AST."""
    return 2 - case.tokens % 2


def random_qkv(case: Case) -> Sequence[torch.Tensor]:
    """q, k, v ``[B, H, N, 64]`` as views of one tensor, like the output of a model's projection."""
    torch.manual_seed(0)
    packed = torch.randn(case.batch, case.tokens, 3, HEADS, HEAD_DIM, device=case.device).to(case.torch_dtype)
    return packed.permute(2, 0, 3, 1, 4).unbind(0)


def random_tokens(case: Case) -> torch.Tensor:
    """Tokens ``[B, N, C]``."""
    torch.manual_seed(0)
    return torch.randn(case.batch, case.tokens, DIM, device=case.device).to(case.torch_dtype)


def random_scores(case: Case) -> torch.Tensor:
    """Scores float32 ``[B, N - extra]``."""
    torch.manual_seed(1)
    return torch.rand(case.batch, case.tokens - extra_tokens(case), device=case.device)


def op_providers(
    case: Case,
    op: Callable,
    alternatives: Mapping[str, Callable],
    *args: Any,
    macs: int | None = None,
    tolerance: float | None = None,
    unread: int = 0,
) -> list[Provider]:
    """List the providers of an op: each of its backends, and the alternatives.

    Args:
        case: the case.
        op: op of ``pruneattn.ops``.
        alternatives: dict of name -> function with the same arguments. If a function returns fewer results than the op,
            only these are compared.
        *args: arguments of the op and of the alternatives.
        macs: multiply-accumulates of the call, if it has any.
        tolerance: replaces `TOLERANCE`.
        unread: rows of tokens in each clip that need not be read, because they are dropped.
    """
    with torch.no_grad(), use_backend("reference"):
        expected = _as_tuple(op(*map(_exact, args)))
        sample = _as_tuple(op(*args))
    unread *= case.batch * DIM * case.torch_dtype.itemsize
    work = Work(None, macs, sum(map(_bytes, (*args, *sample))) - unread)
    check = partial(_check, expected, TOLERANCE[case.torch_dtype] if tolerance is None else tolerance)
    providers = [Provider("ours", call, check, backend=backend, work=work) for backend, call in _ours(case, op, args)]
    for name, function in alternatives.items():
        providers.append(Provider(name, partial(function, *args), check, work=work))
    return providers


def _ours(case: Case, op: Callable, args: Sequence[Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Backends of an op on the case's device and their calls; the default backend first."""
    call = partial(op, *args)
    states = backends()[op.__name__]
    here = [name for name in NAMES if DEVICES.get(name, case.device) == case.device and not states[name].reason]
    if case.device == "cpu" and "triton" in here:
        here.remove("triton")  # runs in the interpreter, for tests only
    here.sort(key=lambda name: states[name].state != "used")
    yield here[0], call
    for name in here[1:]:
        yield name, within(partial(use_backend, name), call)
    if here[0] == "cpu" and op.__name__ in BY_INSTRUCTION_SET:
        for isa in _C.cpu_isas()[1:]:
            yield f"cpu, {isa}", within(partial(instruction_set, isa), call)


def within(context: Callable[[], AbstractContextManager], function: Callable[[], Any]) -> Callable[[], Any]:
    """Wrap a function so that each call runs in a new ``context()``."""

    def call() -> Any:
        with context():
            return function()

    return call


def compiled(function: Callable) -> Callable:
    """The function with ``torch.compile``, which compiles at the first call with each shape."""
    return torch.compile(function, dynamic=False)


def by_each_kernel(name: str, function: Callable, *args: torch.Tensor | int) -> dict[str, Callable]:
    """The function with each of PyTorch's attention kernels that supports these arguments. Empty on a CPU, which has
    only one kernel.
    """
    kernels = attention_kernels(function, *args) if isinstance(args[0], torch.Tensor) and args[0].is_cuda else ()
    return {f"{name}, {kernel}": forced for kernel, forced, why_not in kernels if not why_not}


def forward_and_backward(function: Callable) -> Callable:
    """Wrap a function of q, k and v so that it also runs the backward pass for output gradients of 1.

    The wrapped function returns the output and the gradients of q, k and v.
    """

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any) -> tuple[torch.Tensor, ...]:
        # The harness runs ops in inference mode.
        with torch.inference_mode(False), torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
            out = function(*inputs, *args)
            out = out[0] if isinstance(out, tuple) else out
            return out, *torch.autograd.grad(out, inputs, torch.ones((), dtype=q.dtype, device=q.device).expand_as(out))

    return call


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Context in which the attention kernels use an instruction set."""
    before = _C.cpu_isa()
    _C.cpu_use_isa(name)
    try:
        yield
    finally:
        _C.cpu_use_isa(before)


def _check(expected: Sequence[torch.Tensor], tolerance: float, result: Any) -> None:
    for number, (ours, reference) in enumerate(zip(_as_tuple(result), expected)):
        what = f"the values of result {number}"
        if reference.is_floating_point():
            check_close(what, ours, reference, tolerance)
        else:
            check_same(what, ours, reference)


def _as_tuple(result: Any) -> tuple:
    return result if isinstance(result, tuple) else (result,)


def _exact(argument: Any) -> Any:
    floating = isinstance(argument, torch.Tensor) and argument.is_floating_point()
    return argument.float() if floating else argument


def _bytes(argument: Any) -> int:
    return argument.numel() * argument.element_size() if isinstance(argument, torch.Tensor) else 0
