"""Files of ``pruneattn.export_model`` compared with the original model. Measured only in the whole grid."""

import tempfile
from functools import partial
from pathlib import Path

import torch

import pruneattn
from bench.harness import engines
from bench.harness.case import Provider, left_out
from bench.harness.subject import Subject, call_at_keep_rate

LEVELS = ("exported",)

#: Provider -> format of the file, and whether it calls our kernels.
FILES = {
    **dict.fromkeys(engines.ENGINES, ("onnx", False)),
    "torch.export": ("torch", False),
    "AOTInductor": ("aoti", False),
    "AOTInductor, our kernels": ("aoti", True),
}


def providers(case, sizes, folder):
    subject = Subject(case)
    for rate in (1.0, sizes.keep_rates[-1]):
        variant = {"check": subject.check(rate), "keep_rate": rate, "work": subject.work(rate)}
        call = partial(call_at_keep_rate, subject.fast, rate, subject.input)
        yield Provider("ours", call, backend=subject.fast_backend, **variant)
        for name, (kind, kernels) in FILES.items():
            why_not = engines.why_not(name, case.device, case.torch_dtype) if kind == "onnx" else ""
            if why_not:
                yield left_out(name, why_not, keep_rate=rate)
                continue
            path = Path(folder, f"{kind}-{kernels}-{rate}{'.onnx' if kind == 'onnx' else '.pt2'}")
            if not path.exists():
                pruneattn.export_model(subject.copy_at(rate), path, kind, kernels=kernels)
            yield Provider(name, partial(_opened(name, path, kind, case.torch_dtype), subject.input), **variant)


def _opened(name, path, kind, dtype):
    if kind == "torch":
        return torch.export.load(path).module()
    if kind == "aoti":
        return torch._inductor.aoti_load_package(str(path))
    return engines.open_onnx(name, path, dtype)


def test_exported(measure, case, sizes):
    with tempfile.TemporaryDirectory() as folder:
        measure(case, list(providers(case, sizes, folder)))
