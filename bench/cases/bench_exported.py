"""Files of ``pruneattn.export_model`` compared with the original model. Measured only in the whole grid."""

import tempfile
from functools import partial
from pathlib import Path

import torch

import pruneattn
from bench.harness.case import Provider, left_out
from bench.harness.machine import version
from bench.harness.subject import Subject, call_at_keep_rate

LEVELS = ("exported",)

#: Provider -> format of the file, and whether it calls our kernels.
FILES = {
    "ONNX Runtime": ("onnx", False),
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
        model = subject.copy_at(rate)
        for name, (kind, kernels) in FILES.items():
            if kind == "onnx" and (case.device == "cuda" or version("onnxruntime") is None):
                yield left_out(
                    name, "runs on the CPU, with onnxruntime: pip install 'pruneattn[export]'", keep_rate=rate
                )
                continue
            path = Path(folder, f"{name}-{rate}{'.onnx' if kind == 'onnx' else '.pt2'}")
            pruneattn.export_model(model, path, kind, kernels=kernels)
            yield Provider(name, partial(_opened(path, kind), subject.input), **variant)


def _opened(path, kind):
    if kind == "torch":
        return torch.export.load(path).module()
    if kind == "aoti":
        return torch._inductor.aoti_load_package(str(path))
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda fbank: torch.from_numpy(session.run(None, {"fbank": fbank.numpy()})[0])


def test_exported(measure, case, sizes):
    with tempfile.TemporaryDirectory() as folder:
        measure(case, list(providers(case, sizes, folder)))
