"""Section ``exported`` of a CPU run: files of ``pruneattn.export_model`` beside the model that they were made of."""

import copy
import tempfile
from functools import partial
from pathlib import Path

import peers
import torch
from cpu_models import FAMILIES, make_model
from machine import version
from report import dtype_name, label_text, measure, progress

import pruneattn

#: What runs the file, how it is made, and what that needs.
FILES = {
    "ONNX Runtime": ("onnx", False),
    "torch.export": ("torch", False),
    "AOTInductor": ("aoti", False),
    "AOTInductor, our kernels": ("aoti", True),
}


def run_exported(settings):
    for family in FAMILIES:
        model, fbank = make_model(settings, family), torch.randn(settings.batch, settings.frames, 128)
        label = {"model": f"{family}_{settings.size}", "dtype": dtype_name(torch.float32)}
        rates = (1.0, settings.peer_keep_rates[-1])
        with tempfile.TemporaryDirectory() as folder:
            variants = {}
            for keep_rate in rates:
                variants |= _variants(label, model, keep_rate, fbank, Path(folder))
            times = measure(label_text(label), variants, settings.rounds)
        rows = []
        for (what, keep_rate), time in times.items():
            saving = 1 - time["p50_ms"] / times[what, 1.0]["p50_ms"]
            rows.append({**label, "batch": settings.batch, "what": what, "keep_rate": keep_rate, **time, "saving": saving})
        yield f"Exported: {label['model']}", rows


def _variants(label, model, keep_rate, fbank, folder):
    """Everything that runs the model at a keep-rate. Files are checked by the export."""
    model = copy.deepcopy(model)
    model.set_keep_rate(keep_rate)
    with torch.inference_mode():
        progress(f"compiling {label_text(label)}, keep-rate {keep_rate}")
        compiled = peers.compiled(copy.deepcopy(model), fbank)
    variants = {
        "eager": partial(model, fbank),
        "compiled": partial(compiled, fbank),
        "optimised": partial(pruneattn.optimize_for_inference(copy.deepcopy(model)), fbank),
    }
    for what, (format, kernels) in FILES.items():
        if format == "onnx" and version("onnxruntime") is None:
            continue
        progress(f"exporting {label_text(label)}, keep-rate {keep_rate}, for {what}")
        path = folder / f"{what}-{keep_rate}{'.onnx' if format == 'onnx' else '.pt2'}"
        pruneattn.export_model(model, path, format, kernels=kernels)
        variants[what] = partial(_opened(path, format), fbank)
    return {(what, keep_rate): call for what, call in variants.items()}


def _opened(path, format):
    if format == "torch":
        return torch.export.load(path).module()
    if format == "aoti":
        return torch._inductor.aoti_load_package(str(path))
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda fbank: session.run(None, {"fbank": fbank.numpy()})
