"""Inference engines of others on the CPU: ONNX Runtime, OpenVINO and CTranslate2. Each is optional."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench.harness.case import Case, Provider, Work, left_out

ONNX_RUNTIME, OPENVINO, CTRANSLATE2 = "ONNX Runtime", "OpenVINO", "CTranslate2"
#: The engines that run ONNX files.
ENGINES = (ONNX_RUNTIME, OPENVINO)

_PACKAGES = {ONNX_RUNTIME: "onnxruntime", OPENVINO: "openvino", CTRANSLATE2: "ctranslate2"}
#: Names of the precisions in which an engine computes a float32 model on a CPU.
_PRECISIONS = {
    ONNX_RUNTIME: {torch.float32: "float32"},
    OPENVINO: {torch.float32: "f32", torch.bfloat16: "bf16"},
    CTRANSLATE2: {torch.float32: "float32"},
}


def why_not(engine: str, device: str, dtype: torch.dtype) -> str:
    """Why an engine cannot run in this precision here; empty if it can."""
    if device != "cpu":
        return "measured on the CPU only"
    if find_spec(_PACKAGES[engine]) is None:
        return f"{_PACKAGES[engine]} is not installed"
    if dtype not in _PRECISIONS[engine]:
        return f"has no {str(dtype).removeprefix('torch.')} on a CPU"
    return ""


def dense_providers(
    case: Case,
    path: Path,
    write: Callable[[], object],
    x: torch.Tensor,
    check: Callable[[Any], None],
    work: Work,
) -> Iterator[Provider]:
    """Providers of an unpruned model, exported as ONNX, in each engine.

    Args:
        case: the case.
        path: the ONNX file.
        write: writes the file in float32. It is called if an engine can run it.
        x: input of the model.
        check: check of the output.
        work: work of a call.
    """
    for engine in ENGINES:
        reason = why_not(engine, case.device, case.torch_dtype)
        if reason:
            yield left_out(engine, reason, keep_rate=1.0)
            continue
        if not path.exists():
            write()
        yield Provider(engine, partial(open_onnx(engine, path, case.torch_dtype), x), check, "ONNX", 1.0, work)


def open_onnx(engine: str, path: Path, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """Open a float32 ONNX file with one input and one output, with PyTorch's number of threads.

    Args:
        engine: one of `ENGINES`.
        path: the file.
        dtype: precision in which the engine computes. Inputs and outputs are float32.

    Returns:
        A function of the input that returns the output.
    """
    threads = torch.get_num_threads()
    if engine == ONNX_RUNTIME:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda x: torch.from_numpy(session.run(None, {name: x.float().numpy()})[0])
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": _PRECISIONS[OPENVINO][dtype],
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
    }
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
    return lambda x: torch.from_numpy(request.infer([x.float().numpy()])[0].copy())


def open_whisper(source: Path, folder: Path, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """Convert a Whisper model for CTranslate2, with PyTorch's number of threads.

    Args:
        source: folder of the Hugging Face model.
        folder: folder for the converted model.
        dtype: precision in which the engine computes.

    Returns:
        A function of the mel spectrograms ``[B, bins, frames]`` that returns the encoder's output ``[B, N, C]``.
    """
    import ctranslate2
    import numpy as np

    if not folder.exists():
        ctranslate2.converters.TransformersConverter(str(source)).convert(str(folder))
    threads = torch.get_num_threads()
    precision = _PRECISIONS[CTRANSLATE2][dtype]
    model = ctranslate2.models.Whisper(str(folder), device="cpu", compute_type=precision, intra_threads=threads)

    def encode(mels: torch.Tensor) -> torch.Tensor:
        given = ctranslate2.StorageView.from_array(np.ascontiguousarray(mels.float().numpy()))
        return torch.from_numpy(np.array(model.encode(given)))

    return encode
