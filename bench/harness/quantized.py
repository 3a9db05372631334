"""8-bit forms of unpruned models in other engines: by ONNX Runtime, and by NNCF for OpenVINO."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench.harness.case import Case, Provider, Work, left_out
from bench.harness.engines import ONNX_RUNTIME, OPENVINO, open_onnx, why_not

#: Inputs from which NNCF takes the ranges of the activations.
CALIBRATION = 8


def int8_providers(
    case: Case,
    path: Path,
    inputs: Callable[[int], torch.Tensor],
    x: torch.Tensor,
    check: Callable[[Any], None],
    work: Work,
) -> Iterator[Provider]:
    """Providers of an unpruned model with 8-bit weights and activations.

    Args:
        case: the case.
        path: ONNX file of the model in float32. The quantized files are written next to it.
        inputs: function of a number that returns an input for calibration.
        x: input of the model.
        check: check of the output.
        work: work of a call.
    """
    reason = why_not(ONNX_RUNTIME, case.device, torch.float32)
    if reason:
        yield left_out(ONNX_RUNTIME, reason, backend="int8, dynamic", keep_rate=1.0)
    else:
        call = partial(open_onnx(ONNX_RUNTIME, _dynamic(path), torch.float32), x)
        yield Provider(ONNX_RUNTIME, call, check, "int8, dynamic", 1.0, work)
    reason = why_not(OPENVINO, case.device, torch.float32) or ("" if find_spec("nncf") else "nncf is not installed")
    for dtype in (torch.float32, torch.bfloat16):
        backend = f"int8, NNCF, {str(dtype).removeprefix('torch.')} for the rest"
        if reason:
            yield left_out(OPENVINO, reason, backend=backend, keep_rate=1.0)
            continue
        call = partial(open_onnx(OPENVINO, _post_training(path, inputs), dtype), x)
        yield Provider(OPENVINO, call, check, backend, 1.0, work)


def _dynamic(path: Path) -> Path:
    """The file with linear layers that quantize their input on the fly."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantized = path.with_suffix(".dynamic.onnx")
    if not quantized.exists():
        quantize_dynamic(
            path, quantized, weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=["MatMul", "Gemm"]
        )
    return quantized


def _post_training(path: Path, inputs: Callable[[int], torch.Tensor]) -> Path:
    """OpenVINO's form of the file, quantized by NNCF for transformers."""
    import nncf
    import openvino

    quantized = path.with_suffix(".xml")
    if not quantized.exists():
        logging.getLogger("nncf").setLevel(logging.ERROR)
        data = nncf.Dataset([inputs(number).numpy() for number in range(CALIBRATION)])
        model = openvino.Core().read_model(path)
        model = nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=CALIBRATION)
        openvino.save_model(model, quantized)
    return quantized
