"""What the benchmarks of the ops share: inputs, and how a result is held against the reference."""

from contextlib import contextmanager
from functools import partial

import torch

from bench.harness.guards import check_close, check_same
from bench.harness.measure import Provider, Work
from pruneattn import backends, use_backend
from pruneattn.ops.backend import _C, DEVICES, NAMES
from pruneattn.runtime.timing import attention_kernels

HEADS, HEAD_DIM, DIM = 12, 64, 768

#: Ops whose CPU kernels are chosen by instruction set.
BY_INSTRUCTION_SET = ("attention", "column_mean_attention", "cls_scores", "cls_prune_tokens", "pruned_attention")

#: Largest difference of an op's result from the float32 reference, as a share of the largest value.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def extra_tokens(case):
    """Of the 65, 257 and 513 tokens of an AudioMAE one is no patch, of the 66, 258 and 514 of an AST two."""
    return 2 - case.tokens % 2


def random_qkv(case):
    """q, k, v ``[B, H, N, 64]`` as views of one tensor, as a model's projection makes them."""
    torch.manual_seed(0)
    packed = torch.randn(case.batch, case.tokens, 3, HEADS, HEAD_DIM, device=case.device).to(case.torch_dtype)
    return packed.permute(2, 0, 3, 1, 4).unbind(0)


def random_tokens(case):
    """Tokens ``[B, N, C]``."""
    torch.manual_seed(0)
    return torch.randn(case.batch, case.tokens, DIM, device=case.device).to(case.torch_dtype)


def random_scores(case):
    """Scores float32 ``[B, N - extra]``."""
    torch.manual_seed(1)
    return torch.rand(case.batch, case.tokens - extra_tokens(case), device=case.device)


def op_providers(case, op, alternatives, *args, macs=None, tolerance=None, unread=0):
    """Our op by each of its backends, and alternatives to it.

    Args:
        case: `Case`.
        op: one of ours.
        alternatives: dict of name -> function of the same arguments. One that returns less is compared in that.
        *args: what they are called with.
        macs: multiply-accumulates of the call; None where there are none.
        tolerance: in place of `TOLERANCE`.
        unread: rows of tokens that need not be read, since they are dropped.
    """
    with torch.no_grad(), use_backend("reference"):
        expected = _as_tuple(op(*map(_exact, args)))
        sample = _as_tuple(op(*args))
    unread *= case.batch * DIM * case.torch_dtype.itemsize
    work = Work(None, macs, sum(map(_bytes, (*args, *sample))) - unread)
    check = partial(_check, expected, TOLERANCE[case.torch_dtype] if tolerance is None else tolerance)
    providers = []
    for backend, call in _ours(case, op, args):
        providers.append(Provider("ours", call, check, backend=backend, work=work))
    for name, function in alternatives.items():
        providers.append(Provider(name, partial(function, *args), check, work=work))
    return providers


def _ours(case, op, args):
    """Backends and calls of an op of ours on the case's device, what runs by default first."""
    call = partial(op, *args)
    states = backends()[op.__name__]
    here = [name for name in NAMES if DEVICES.get(name, case.device) == case.device and not states[name].reason]
    if case.device == "cpu" and "triton" in here:
        here.remove("triton")  # its interpreter is no way to run anything
    here.sort(key=lambda name: states[name].state != "used")
    yield here[0], call
    for name in here[1:]:
        yield name, within(partial(use_backend, name), call)
    if here[0] == "cpu" and op.__name__ in BY_INSTRUCTION_SET:
        for isa in _C.cpu_isas()[1:]:
            yield f"cpu, {isa}", within(partial(instruction_set, isa), call)


def within(context, function):
    """The function, each call of it in a new ``context()``."""

    def call():
        with context():
            return function()

    return call


def compiled(function):
    """The function by ``torch.compile``, at its first call for each shape."""
    return torch.compile(function, dynamic=False)


def by_each_kernel(name, function, *args):
    """The function by each of PyTorch's attention kernels that runs these arguments; none on a CPU, which has but one."""
    kernels = attention_kernels(function, *args) if args[0].is_cuda else ()
    return {f"{name}, {kernel}": forced for kernel, forced, why_not in kernels if not why_not}


def forward_and_backward(function):
    """The function of q, k and v with gradients: returns those of its output times a fixed one, after the output."""

    def call(q, k, v, *args):
        # The benchmarks of the ops run in inference mode.
        with torch.inference_mode(False), torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
            out = function(*inputs, *args)
            out = out[0] if isinstance(out, tuple) else out
            return out, *torch.autograd.grad(out, inputs, torch.ones((), dtype=q.dtype, device=q.device).expand_as(out))

    return call


@contextmanager
def instruction_set(name):
    """Make the attention kernels use this instruction set."""
    before = _C.cpu_isa()
    _C.cpu_use_isa(name)
    try:
        yield
    finally:
        _C.cpu_use_isa(before)


def _check(expected, tolerance, result):
    for number, (ours, reference) in enumerate(zip(_as_tuple(result), expected)):
        what = f"the values of result {number}"
        if reference.is_floating_point():
            check_close(what, ours, reference, tolerance)
        else:
            check_same(what, ours, reference)


def _as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def _exact(argument):
    floating = isinstance(argument, torch.Tensor) and argument.is_floating_point()
    return argument.float() if floating else argument


def _bytes(argument):
    return argument.numel() * argument.element_size() if isinstance(argument, torch.Tensor) else 0
