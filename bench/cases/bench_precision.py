"""Whole models in float32, bfloat16 and int8, compared with unpruned models in other engines."""

import copy
import importlib
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

import pruneattn
from bench.harness import engines, peers, quantized
from bench.harness.case import Provider, left_out
from bench.harness.guards import TOLERANCE, check_close
from bench.harness.subject import PRUNED_TOLERANCE, Subject, call_at_keep_rate
from pruneattn.constants import MEL_BINS

LEVELS = ("precision",)

#: Largest difference of the logits, relative to the largest logit. Static ranges give 0.1 on random weights.
INT8_TOLERANCE, INT8_PRUNED_TOLERANCE = 0.2, 0.3


def providers(case, sizes, folder):
    subject = Subject(case._replace(dtype="float32"))
    yield from ours(subject, sizes)
    yield from library_model(subject)
    yield from zentorch(subject)
    path = Path(folder, "dense.onnx")
    for dtype in (torch.float32, torch.bfloat16):
        other = case._replace(dtype=str(dtype).removeprefix("torch."))
        write = partial(pruneattn.export_model, subject.model, path, "onnx")
        arguments = (write, subject.fbank, check(subject, 1.0, dtype), subject.work())
        for provider in engines.dense_providers(other, path, *arguments):
            yield provider._replace(backend=other.dtype)
    arguments = (inputs_like(subject.fbank), subject.fbank, check(subject, 1.0, torch.int8), subject.work())
    yield from quantized.int8_providers(case, path, *arguments)


def ours(subject, sizes):
    """Our optimized model in each precision that this machine has."""
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        name = str(dtype).removeprefix("torch.")
        if not has(dtype):
            yield left_out("ours", "this CPU has no instructions for it", backend=name)
            continue
        model = pruneattn.optimize_for_inference(copy.deepcopy(subject.model), dtype)
        for rate in sizes.keep_rates:
            call = partial(call_at_keep_rate, model, rate, subject.fbank)
            yield Provider("ours", call, check(subject, rate, dtype), name, rate, subject.work(rate))


def library_model(subject):
    """The other library's model with the same weights."""
    name, make = peers.library_model(subject.model)
    if why_not := peers.why_not(name):
        yield left_out(name, why_not)
        return
    for dtype in filter(has, (torch.float32, torch.bfloat16)):
        model = make(copy.deepcopy(subject.model).to(dtype))
        call = partial(model, subject.fbank.to(dtype))
        backend = str(dtype).removeprefix("torch.")
        yield Provider(name, call, check(subject, 1.0, dtype), backend, 1.0, subject.work())


def zentorch(subject):
    """The unpruned model compiled by AMD's backend of ``torch.compile``."""
    if find_spec("zentorch") is None:
        yield left_out("zentorch", "zentorch is not installed", keep_rate=1.0)
        return
    importlib.import_module("zentorch")  # registers the backend

    for dtype in filter(has, (torch.float32, torch.bfloat16)):
        model = torch.compile(copy.deepcopy(subject.model).to(dtype), backend="zentorch", dynamic=False)
        call = partial(model, subject.fbank.to(dtype))
        backend = str(dtype).removeprefix("torch.")
        yield Provider("zentorch", call, check(subject, 1.0, dtype), backend, 1.0, subject.work())


def has(dtype):
    """Whether this CPU has instructions for products in this dtype, or the package has a kernel."""
    return dtype != torch.bfloat16 or torch.cpu._is_avx512_bf16_supported()


def check(subject, rate, dtype):
    """Check of logits against the float32 model, pruned by the reference ops."""
    if dtype == torch.int8:
        tolerance = INT8_TOLERANCE if rate == 1 else INT8_PRUNED_TOLERANCE
    else:
        tolerance = TOLERANCE[dtype] if rate == 1 else PRUNED_TOLERANCE[dtype]
    return partial(check_close, "logits", expected=subject.expected(rate).logits, tolerance=tolerance)


def inputs_like(fbank):
    """Function of a number that returns another random input of one clip."""

    def make(number):
        generator = torch.Generator().manual_seed(1 + number)
        return torch.randn(1, fbank.shape[1], MEL_BINS, generator=generator)

    return make


def test_precision(measure, case, sizes):
    with tempfile.TemporaryDirectory() as folder:
        measure(case, list(providers(case, sizes, folder)))
