"""Export of a model, including its pruning, to one file for ONNX Runtime or for PyTorch without this package."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..constants import MEL_BINS, VERSION, WINDOW
from ..data.fbank import FeatureExtractor, samples_for
from ..errors import UserError
from ..files import atomic_write
from ..ops.backend import references
from . import export_int8
from .optimize import PackedLinear
from .vit import PrunedViT

#: Format names and file name endings.
FORMATS = {"onnx": ".onnx", "torch": ".pt2", "aoti": "-aoti.pt2"}
#: Metadata property of ONNX and AOTInductor files that holds the description (JSON).
KEY = "pruneattn"
#: Extra file of ``torch.export`` files that holds the description (JSON).
DESCRIPTION_FILE = "pruneattn.json"

# Relative difference of the logits that rounding can cause: a patch may cross the threshold; in half precision many do.
_TOLERANCE = {torch.float64: 1e-2, torch.float32: 1e-2, torch.bfloat16: 0.3, torch.float16: 0.3}
_TOLERANCE[torch.int8] = export_int8.TOLERANCE

_RUN_ELSEWHERE = """
import sys
file, arguments, format, kernels = sys.argv[1:]
if kernels == "False":
    sys.modules["pruneattn"] = None  # as if it were not installed
else:
    import pruneattn.ops
import torch
runs = torch.load(arguments)
if format == "aoti":
    run = torch._inductor.aoti_load_package(file)
else:
    run = torch.export.load(file).module()
with torch.no_grad():
    torch.save([run(*inputs) for inputs in runs], arguments)
"""


def export_model(
    model: nn.Module,
    path: str | Path,
    format: Literal["onnx", "torch", "aoti"],
    *,
    example: Tensor | None = None,
    waveform: bool = False,
    dtype: torch.dtype | None = None,
    kernels: bool = False,
    calibrate: Iterable[Tensor] | None = None,
) -> float:
    """Write a model to a file for inference without this package.

    The file includes the pruning at the model's current keep-rates, and accepts any batch size. By default it contains
    only PyTorch's (or ONNX's) operators: each op of this package is replaced by its reference. Before the file is put
    in place, it runs on random input, in ONNX Runtime or in a separate process that cannot import this package, and its
    logits are compared with the model's.

    Ties go to the lower patch number, as in the model. The order of scores that are not finite depends on the runtime.

    Args:
        model: model of :func:`pruneattn.create_model`; or, with ``example``, any module that takes one tensor and
            returns logits, as a tensor or as ``.logits``, for example a model that :func:`pruneattn.prune` changed. The
            model is not changed.
        path: file to write: ``.onnx`` for "onnx", ``.pt2`` for "torch" and "aoti".
        format: ``"onnx"``; ``"torch"``: a program of ``torch.export``; ``"aoti"``: compiled by AOTInductor, for this
            type of machine and this version of PyTorch.
        example: input ``[B, ...]`` of a model that is not of ``create_model``; its first dimension becomes dynamic.
        waveform: the exported model takes samples (float32 ``[B, L]`` at 16 kHz, with the L that the model's frames
            need, padded with any values) and the clips' lengths in samples (int64 ``[B]``, at least 400), instead of
            log-mel spectrograms. Needs ``model.features``.
        dtype: dtype of weights and activations; None: the model's. Inputs and logits are always float32.
            ``torch.int8``, only for ONNX: int8 weights and uint8 inputs of the linear layers, all else
            float32; requires ``calibrate`` and does not support ``waveform``.
        kernels: call this package's kernels, which are faster on a CPU. The program that runs the file then needs
            ``import pruneattn.ops``. Not for ONNX.
        calibrate: inputs of the model ``[B, ...]`` for ``torch.int8``, for example log-mel spectrograms
            ``[B, frames, 128]`` of some training clips. Their activations give the fixed range of each tensor, and the
            file is checked on the first four of them instead of random input. They are all held in memory.

    Returns:
        Largest difference of a logit from the model's, relative to the root mean square of the model's logits.

    Raises:
        UserError: an argument is invalid, a package is not installed, the format does not support a part of the model,
            or the written file does not compute the same logits.
    """
    path = Path(path)
    _check(model, path, format, example, waveform, kernels)
    export_int8.check_int8(dtype, format, waveform, calibrate is not None)
    wrapped = _Exported(model, waveform, torch.float32 if dtype == torch.int8 else dtype)
    dtype = dtype or wrapped.dtype
    inputs = _inputs(wrapped.model, example, waveform, batch=2)
    batches = None if calibrate is None else export_int8.calibration_inputs(calibrate, inputs[0])
    names, description = _names(model, waveform), _description(model, waveform, dtype, kernels)
    try:
        with warnings.catch_warnings(), atomic_write(path) as temporary:
            warnings.simplefilter("ignore")  # the exporters warn about their own code
            with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=".export-") as folder:
                file = Path(folder, path.name)
                _WRITERS[format](_program(wrapped, inputs, format, kernels), file, names, description)
                if batches is None:
                    runs = [_inputs(wrapped.model, example, waveform, batch) for batch in (1, 3)]
                else:
                    export_int8.quantize_file(file, batches)
                    runs = export_int8.check_runs(batches)
                difference = _check_file(file, format, kernels, wrapped, runs, _TOLERANCE[dtype])
                file.replace(temporary)
    except (UserError, OSError):
        raise
    except Exception as error:  # each exporter raises its own types
        reason = _first_line(error)
        raise UserError(f"{path}: {type(model).__name__} cannot be exported as {format}: {reason}") from error
    return difference


def _first_line(error: BaseException) -> str:
    """First line of the root cause, without colors: the exporters wrap it in advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    return next(filter(None, map(str.strip, text.splitlines())), type(error).__name__)


class _Exported(nn.Module):
    """The exported computation: features if wanted, the model, float32 logits."""

    def __init__(self, model: nn.Module, waveform: bool, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).to(dtype=dtype).eval().requires_grad_(False)
        self.dtype = next(self.model.parameters()).dtype
        self.features: FeatureExtractor | None = None
        if waveform:
            device = next(model.parameters()).device
            self.features = FeatureExtractor(cast("PrunedViT", model).features).to(device)

    def forward(self, input: Tensor, lengths: Tensor | None = None) -> Tensor:
        if self.features is not None:
            input = self.features(input, lengths)  # [B, frames, 128]
        output = self.model(input if isinstance(self.model, PrunedViT) else input.to(self.dtype))
        return getattr(output, "logits", output).float()  # [B, num_classes]


def _check(model: nn.Module, path: Path, format: str, example: Tensor | None, waveform: bool, kernels: bool) -> None:
    """Raise a UserError if an argument is invalid."""
    if format not in FORMATS:
        raise UserError(f"format: expected {', '.join(FORMATS)}, got {format!r}")
    suffix = Path("x" + FORMATS[format]).suffix
    if path.suffix != suffix:
        raise UserError(f"{path}: the file name for the format {format} must end in {suffix}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"cannot write {path}: the folder {path.parent} does not exist")
    if kernels and format == "onnx":
        raise UserError(
            "kernels: ONNX does not support this package's operators: export without kernels, or as torch or aoti"
        )
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise UserError(
            "export: the model was optimized for inference, and packed weights cannot be exported: load it again and "
            "export it without optimizing it"
        )
    if isinstance(model, PrunedViT) == (example is not None):
        raise UserError(
            "example: required for a model that is not of create_model, and not accepted for any other model"
        )
    if waveform and not (isinstance(model, PrunedViT) and model.features):
        raise UserError(
            "waveform: the features of the model are unknown: set model.features to the FeatureConfig of its training"
        )
    if format == "onnx":
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"the format onnx needs {error.name}, which is not installed: pip install 'pruneattn[export]'"
            ) from error


def _inputs(model: nn.Module, example: Tensor | None, waveform: bool, batch: int) -> tuple[Tensor, ...]:
    """Random inputs for ``batch`` clips."""
    generator = torch.Generator().manual_seed(batch)
    device = next(model.parameters()).device
    if example is not None:
        return (torch.randn(batch, *example.shape[1:], generator=generator).to(example),)
    model = cast("PrunedViT", model)
    if not waveform:
        return (torch.randn(batch, model.frames, MEL_BINS, generator=generator).to(device),)
    samples = samples_for(model.frames)
    lengths = torch.linspace(samples, WINDOW, batch, dtype=torch.int64)
    return 0.1 * torch.randn(batch, samples, generator=generator).to(device), lengths.to(device)


def _names(model: nn.Module, waveform: bool) -> list[str]:
    """Names of the inputs."""
    if waveform:
        return ["waves", "lengths"]
    return ["fbank"] if isinstance(model, PrunedViT) else ["input"]


def _description(model: nn.Module, waveform: bool, dtype: torch.dtype, kernels: bool) -> str:
    """The facts that a user of the file needs, as JSON."""
    about: dict[str, Any] = {
        "pruneattn": VERSION,
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
    }
    about |= {"inputs": _names(model, waveform), "output": "logits", "needs_pruneattn_ops": kernels}
    if isinstance(model, PrunedViT):
        about |= {"model": model.name, "score": model.score if isinstance(model.score, str) else "a function"}
        about |= {"frames": model.frames, "stride": list(model.stride), "keep_rates": list(model.keep_rates)}
        about |= {"features": model.features and model.features.to_dict()}
        about |= {"labels": model.labels, "multilabel": model.multilabel}
    return json.dumps(about, ensure_ascii=False)


def _program(wrapped: _Exported, inputs: tuple[Tensor, ...], format: str, kernels: bool) -> ExportedProgram:
    """The program of ``torch.export``, with a dynamic batch."""
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        program = torch.export.export(wrapped, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs))
        return program if kernels else program.run_decompositions(_decompositions(keep_selection=format == "onnx"))


def _decompositions(keep_selection: bool) -> dict[Any, Callable[..., Any]]:
    """Replacement of each op. ``keep_selection`` keeps ``select_tokens``, also where it is fused into another op."""
    table = references()
    if keep_selection:
        select, gather = torch.ops.pruneattn.select_tokens.default, table[torch.ops.pruneattn.gather_tokens.default]

        def prune_tokens(
            scores: Tensor, x: Tensor, y: Tensor, keep: int, extra_tokens: int
        ) -> tuple[Tensor, Tensor, Tensor]:
            index = select(scores, keep)
            return index, gather(x, index, extra_tokens), gather(y, index, extra_tokens)

        def prune_epilogue(partial_scores: Tensor, *args: Any) -> tuple[Tensor, ...]:
            scores = partial_scores.sum(1)
            return scores, *prune_tokens(scores, *args)

        def cls_prune_tokens(
            q_cls: Tensor, k: Tensor, x: Tensor, y: Tensor, keep: int, extra_tokens: int, scale: float | None = None
        ) -> tuple[Tensor, ...]:
            scores = table[torch.ops.pruneattn.cls_scores.default](q_cls, k, extra_tokens, scale)
            return scores, *prune_tokens(scores, x, y, keep, extra_tokens)

        def pruned_attention(
            q: Tensor, k: Tensor, v: Tensor, x: Tensor, keep: int, extra_tokens: int, scale: float | None = None
        ) -> tuple[Tensor, ...]:
            out, scores, lse = table[torch.ops.pruneattn.column_mean_attention.default](q, k, v, extra_tokens, scale)
            return scores, *prune_tokens(scores, x, out.transpose(1, 2).flatten(2), keep, extra_tokens), out, lse

        del table[select]
        table[torch.ops.pruneattn.prune_tokens.default] = prune_tokens
        table[torch.ops.pruneattn.prune_epilogue.default] = prune_epilogue
        table[torch.ops.pruneattn.cls_prune_tokens.default] = cls_prune_tokens
        table[torch.ops.pruneattn.pruned_attention.default] = pruned_attention
    return table


def _write_onnx(program: ExportedProgram, file: Path, names: list[str], description: str) -> None:
    from onnxscript import opset18 as op

    def select_tokens(scores: Any, keep: int) -> Any:
        count: Any = op.Constant(value_ints=[keep])
        _, index = op.TopK(scores, count, axis=1, largest=1, sorted=1)  # equal scores: the lower place comes first
        index, _ = op.TopK(index, count, axis=1, largest=0, sorted=1)
        return index

    onnx = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        optimize=True,
        input_names=names,
        output_names=["logits"],
        custom_translation_table={torch.ops.pruneattn.select_tokens.default: select_tokens},
    )
    assert onnx is not None  # dynamo=True returns a program
    onnx.model.metadata_props[KEY] = description
    onnx.save(file)


def _write_torch(program: ExportedProgram, file: Path, names: list[str], description: str) -> None:
    torch.export.save(program, file, extra_files={DESCRIPTION_FILE: description})


def _write_aoti(program: ExportedProgram, file: Path, names: list[str], description: str) -> None:
    settings = {"aot_inductor.metadata": {KEY: description}}
    torch._inductor.aoti_compile_and_package(program, package_path=str(file), inductor_configs=settings)


_WRITERS = {"onnx": _write_onnx, "torch": _write_torch, "aoti": _write_aoti}


def _check_file(
    file: Path, format: str, kernels: bool, wrapped: _Exported, runs: list[tuple[Tensor, ...]], tolerance: float
) -> float:
    """Run a file as its users will, and return the largest relative difference from the model on these inputs.

    Raises:
        UserError: the difference is too large, or the file does not run.
    """
    with torch.no_grad():
        expected = torch.cat([wrapped(*inputs) for inputs in runs])  # [4, num_classes]
    outputs = _run_onnx(file, runs) if format == "onnx" else _run_elsewhere(file, runs, format, kernels)
    scale = expected.square().mean().sqrt()
    difference = ((torch.cat(outputs).to(expected) - expected).abs().max() / scale).item()
    if not difference < tolerance:
        raise UserError(
            f"the file in the format {format} was not kept, because it does not compute the model's logits: they "
            f"differ by {difference:.2g} relative to their root mean square"
        )
    return difference


def _run_onnx(file: Path, runs: list[tuple[Tensor, ...]]) -> list[Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    outputs = [
        session.run(None, {name: x.cpu().numpy() for name, x in zip(names, inputs, strict=True)}) for inputs in runs
    ]
    return [torch.from_numpy(output[0]) for output in outputs]


def _run_elsewhere(file: Path, runs: list[tuple[Tensor, ...]], format: str, kernels: bool) -> list[Tensor]:
    """Run a file in a separate process; unless ``kernels``, one that cannot import this package."""
    arguments = file.with_name("arguments.pt")
    torch.save(runs, arguments)
    command = [sys.executable, "-c", _RUN_ELSEWHERE, str(file), str(arguments), format, str(kernels)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"the process ended with code {done.returncode}"])[-1]
        raise UserError(
            f"the file in the format {format} was not kept, because it does not run in a separate process: {reason}"
        )
    return torch.load(arguments)
