"""8-bit ONNX files: quantization of an exported float file by ONNX Runtime, with ranges from calibration inputs."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError

#: Largest difference of a logit from the float model's, relative to the root mean square of the logits. The scales are
#: fixed per tensor, so each layer adds errors of some percent and patches near the threshold change. With random
#: weights the logits differ by up to about half of it. Unrelated logits differ by twice the root mean square or more.
TOLERANCE = 0.8

_ANY_SIZE = 2**31  # bytes; an ONNX file of one piece is smaller


def check_int8(dtype: torch.dtype | None, format: str, waveform: bool, calibrated: bool) -> None:
    """Raise a UserError if 8-bit export does not support an argument, or if ``calibrate`` does not fit the dtype.

    Args:
        dtype: dtype of the exported model.
        format: name of the format.
        waveform: whether the exported model takes samples.
        calibrated: whether there are calibration inputs.
    """
    if dtype != torch.int8:
        if calibrated:
            raise UserError("calibrate (--calibrate) applies only with dtype (--dtype) int8")
        return
    if format != "onnx":
        raise UserError(f"dtype (--dtype) int8: the format {format} does not support it: export as onnx")
    if waveform:
        raise UserError(
            "waveform (--waveform): not supported with dtype (--dtype) int8: export a model of log-mel spectrograms"
        )
    if not calibrated:
        raise UserError(
            "calibrate (--calibrate): dtype (--dtype) int8 needs calibration inputs for the ranges of the activations: "
            "pass some inputs of the training data"
        )


def calibration_inputs(calibrate: Iterable[Tensor], like: Tensor) -> list[Tensor]:
    """The calibration batches in the dtype and on the device of the model's input.

    Args:
        calibrate: tensors ``[B, ...]``; B may differ between them.
        like: an input of the model.

    Raises:
        UserError: there is no input, or one has another shape than the model's or is not finite.
    """
    batches = []
    for batch in calibrate:
        if not isinstance(batch, Tensor):
            raise UserError(f"calibrate: expected tensors, got {type(batch).__name__}")
        if batch.ndim != like.ndim or batch.shape[1:] != like.shape[1:]:
            shape = ", ".join(["B", *map(str, like.shape[1:])])
            raise UserError(f"calibrate: expected inputs of shape [{shape}], got {list(batch.shape)}")
        if not batch.isfinite().all():
            raise UserError("calibrate: an input is not finite: remove it")
        if len(batch):
            batches.append(batch.detach().to(like))
    if not batches:
        raise UserError("calibrate (--calibrate): there is no calibration input: pass at least one")
    return batches


def check_runs(batches: list[Tensor]) -> list[tuple[Tensor, ...]]:
    """The first calibration inputs as a batch of one and a batch of three, repeated if there are fewer than four.

    The file is checked on these: random input may exceed the ranges of the calibration inputs.
    """
    few = torch.cat([batch[:4] for batch in batches[:4]])[:4]
    few = few[torch.arange(4, device=few.device) % len(few)]
    return [(few[:1],), (few[1:],)]


def quantize_file(file: Path, batches: list[Tensor]) -> None:
    """Replace a float32 ONNX file of one input by its 8-bit form, with QuantizeLinear and DequantizeLinear nodes (QDQ).

    The weights of the linear layers become int8 with a scale per output channel. Their inputs become uint8
    with one scale and zero point per tensor, from the smallest and the largest value on the calibration inputs.
    Products of two activations, as in the attention, stay in floating point. Metadata is kept.

    Args:
        file: file to replace; its folder is used for temporary files.
        batches: result of ``calibration_inputs``.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds: Iterator[dict[str, Any]] = ({name: batch.cpu().numpy()} for batch in batches)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.feeds, None)

    name, floating = _prepare(file)
    quantized = file.with_name("int8.onnx")
    linear = ["MatMul", "Gemm"]
    with _quiet():
        quantize_static(
            file,
            quantized,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=linear,
            nodes_to_exclude=floating,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            # Outputs stay float32: ONNX Runtime then adds the bias in its 8-bit kernel, which is faster.
            extra_options={"OpTypesToExcludeOutputQuantization": linear},
        )
    quantized.replace(file)


def _prepare(file: Path) -> tuple[str, list[str]]:
    """Prepare a float file for quantization; return its input's name and the nodes that stay in floating point.

    Slices and transposes of weights, for example for the queries of the pruning blocks, are computed here, because only
    stored weights are quantized and PyTorch's exporter computes only small constants. Products of two activations stay
    in floating point, for the precision of scores and attention. So do products of concatenated tokens, which are these
    queries: OpenVINO 2026 cannot compile their quantized form.
    """
    import onnx
    from onnxscript import optimizer

    model = optimizer.optimize(onnx.load(file), input_size_limit=_ANY_SIZE, output_size_limit=_ANY_SIZE)
    onnx.save(model, file)
    graph = model.graph
    stored = {one.name for one in graph.initializer}
    concatenated = {node.output[0] for node in graph.node if node.op_type == "Concat"}
    products = [node for node in graph.node if node.op_type == "MatMul"]
    floating = [node.name for node in products if node.input[1] not in stored or node.input[0] in concatenated]
    (one,) = graph.input
    return one.name, floating


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the log messages of ``onnxruntime.quantization``, which are written to the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
