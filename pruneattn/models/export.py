"""A model, pruning inside, as one file for ONNX Runtime or for PyTorch without this package: :func:`export_model`."""

import copy
import importlib
import json
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn

from ..constants import MEL_BINS, VERSION
from ..errors import UserError
from ..files import atomic_write
from ..ops.backend import references
from .vit import PrunedViT

#: Formats, each with the end of a file's name.
FORMATS = {"onnx": ".onnx", "torch": ".pt2", "aoti": "-aoti.pt2"}
KEY = "pruneattn"  # of the description (JSON): a metadata property in ONNX and AOTInductor files
DESCRIPTION_FILE = "pruneattn.json"  # and an extra file in those of torch.export

# Relative difference of the logits that rounding can make: a patch may cross the threshold, in half precision many do.
_TOLERANCE = {torch.float64: 1e-2, torch.float32: 1e-2, torch.bfloat16: 0.3, torch.float16: 0.3}

_RUN_ELSEWHERE = """
import sys
file, arguments, format, kernels = sys.argv[1:]
if kernels == "False":
    sys.modules["pruneattn"] = None  # as where it is not installed
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


def export_model(model, path, format, *, example=None, waveform=False, dtype=None, kernels=False):
    """Write a model for inference elsewhere: the pruning of its present keep-rates inside, any number of clips a call.

    By default the file holds PyTorch's (or ONNX's) own operators only, each op of this package in the form of its
    reference, and whoever runs it needs nothing of this package. It is run before it takes its place: in ONNX Runtime,
    or in a process of its own in which this package cannot be imported, on random input, beside the model.

    Equal scores go to the lower patch number there too. Scores that are not finite are ranked as the runtime likes.

    Args:
        model: of :func:`pruneattn.create_model`; or with ``example`` any module that takes one tensor and returns
            logits, in a tensor or as ``.logits``, such as one that :func:`pruneattn.prune` changed. It is not changed.
        path: file to write: ``.onnx``, or ``.pt2`` for the other two.
        format: ``"onnx"``; ``"torch"``: a program of ``torch.export``; ``"aoti"``: compiled by AOTInductor, for this
            kind of machine and this version of PyTorch.
        example: input of a model that is not ours, ``[B, ...]``, whose first dimension may be of any size.
        waveform: take samples (float32 ``[B, L]`` at 16 kHz, L as the model's frames need it, padded with anything)
            and the clips' lengths (int64 ``[B]``, at least 400) in place of log-mels. Needs ``model.features``.
        dtype: of weights and activations; None: as they are. Inputs and logits are float32 in any case.
        kernels: call this package's kernels, which are faster on a CPU; whoever runs the file needs
            ``import pruneattn.ops``. Not for ONNX.

    Returns:
        Largest difference of a logit from the model's own, relative to their root mean square.

    Raises:
        UserError: an argument cannot be used, a package is missing, the format has no place for a part of the model,
            or what was written does not do what the model does.
    """
    path = Path(path)
    _check(model, path, format, example, waveform, kernels)
    wrapped = _Exported(model, waveform, dtype)
    inputs = _inputs(wrapped.model, example, waveform, batch=2)
    names, description = _names(model, waveform), _description(model, waveform, wrapped, kernels)
    try:
        with warnings.catch_warnings(), atomic_write(path) as temporary:
            warnings.simplefilter("ignore")  # of the exporters, about themselves
            with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=".export-") as folder:
                file = Path(folder, path.name)
                _WRITERS[format](_program(wrapped, inputs, format, kernels), file, names, description)
                difference = _check_file(file, format, kernels, wrapped, example, waveform)
                file.replace(temporary)
    except (UserError, OSError):
        raise
    except Exception as error:  # of the exporters, of which each has its own kinds
        reason = _first_line(error)
        raise UserError(f"{path}: {type(model).__name__} cannot be exported as {format}: {reason}") from error
    return difference


def _first_line(error):
    """What went wrong at first, in one line without colours: the exporters wrap it into advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    return next(filter(None, map(str.strip, text.splitlines())), type(error).__name__)


class _Exported(nn.Module):
    """What the file computes."""

    def __init__(self, model, waveform, dtype):
        super().__init__()
        self.model = copy.deepcopy(model).to(dtype=dtype).eval().requires_grad_(False)
        self.dtype = next(self.model.parameters()).dtype
        self.features = None
        if waveform:
            from ..data import FeatureExtractor

            self.features = FeatureExtractor(model.features).to(next(model.parameters()).device)

    def forward(self, input, lengths=None):
        if self.features is not None:
            input = self.features(input, lengths)  # [B, frames, 128]
        output = self.model(input if isinstance(self.model, PrunedViT) else input.to(self.dtype))
        return getattr(output, "logits", output).float()  # [B, num_classes]


def _check(model, path, format, example, waveform, kernels):
    if format not in FORMATS:
        raise UserError(f"format: expected {', '.join(FORMATS)}, got {format!r}")
    suffix = Path("x" + FORMATS[format]).suffix
    if path.suffix != suffix:
        raise UserError(f"{path}: the name of a file in the format {format} must end in {suffix}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}")
    if kernels and format == "onnx":
        raise UserError(
            "kernels: ONNX has no place for this package's operators: leave them out, or use the format torch or aoti"
        )
    if any(isinstance(module, PrunedViT) and module.optimized for module in model.modules()):
        raise UserError(
            "export: the model was optimized for inference, and its packed weights fit into no file: load it again and "
            "export it as it is"
        )
    if isinstance(model, PrunedViT) == (example is not None):
        raise UserError("example: needed for a model that is not of create_model, and only for such a one")
    if waveform and not (isinstance(model, PrunedViT) and model.description.features):
        raise UserError("waveform: the model does not say how its input is made: set model.features (FeatureConfig)")
    if format == "onnx":
        try:
            for package in ("onnx", "onnxscript", "onnxruntime"):
                importlib.import_module(package)
        except ImportError as error:
            raise UserError(f"the format onnx needs {error.name}: pip install 'pruneattn[export]'") from error


def _inputs(model, example, waveform, batch):
    """Random inputs for so many clips."""
    generator = torch.Generator().manual_seed(batch)
    device = next(model.parameters()).device
    if example is not None:
        return (torch.randn(batch, *example.shape[1:], generator=generator).to(example),)
    if not waveform:
        return (torch.randn(batch, model.frames, MEL_BINS, generator=generator).to(device),)
    from ..constants import WINDOW
    from ..data.fbank import samples_for

    samples = samples_for(model.frames)
    lengths = torch.linspace(samples, WINDOW, batch, dtype=torch.int64)
    return 0.1 * torch.randn(batch, samples, generator=generator).to(device), lengths.to(device)


def _names(model, waveform):
    if waveform:
        return ["waves", "lengths"]
    return ["fbank"] if isinstance(model, PrunedViT) else ["input"]


def _description(model, waveform, wrapped, kernels):
    """What whoever runs the file has to know, as JSON."""
    about = {"pruneattn": VERSION, "torch": torch.__version__, "dtype": str(wrapped.dtype).removeprefix("torch.")}
    about |= {"inputs": _names(model, waveform), "output": "logits", "needs_pruneattn_ops": kernels}
    if isinstance(model, PrunedViT):
        about |= {"model": model.name, "score": model.score if isinstance(model.score, str) else "a function"}
        about |= {"frames": model.frames, "keep_rates": list(model.keep_rates)}
        description = model.description
        about |= {"features": description.features and description.features.to_dict()}
        about |= {"labels": description.labels, "multilabel": description.multilabel}
    return json.dumps(about, ensure_ascii=False)


def _program(wrapped, inputs, format, kernels):
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        program = torch.export.export(wrapped, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs))
        return program if kernels else program.run_decompositions(_decompositions(keep_selection=format == "onnx"))


def _decompositions(keep_selection):
    """What to put in the place of each op. The selection may stay, even where it was fused with the gather."""
    table = references()
    if keep_selection:
        select, gather = torch.ops.pruneattn.select_tokens.default, table[torch.ops.pruneattn.gather_tokens.default]

        def prune_tokens(scores, x, y, keep, extra_tokens):
            index = select(scores, keep)
            return index, gather(x, index, extra_tokens), gather(y, index, extra_tokens)

        def prune_epilogue(partial_scores, *args):
            scores = partial_scores.sum(1)
            return scores, *prune_tokens(scores, *args)

        def cls_prune_tokens(q_cls, k, x, y, keep, extra_tokens, scale=None):
            scores = table[torch.ops.pruneattn.cls_scores.default](q_cls, k, extra_tokens, scale)
            return scores, *prune_tokens(scores, x, y, keep, extra_tokens)

        def pruned_attention(q, k, v, x, keep, extra_tokens, scale=None):
            out, scores, lse = table[torch.ops.pruneattn.column_mean_attention.default](q, k, v, extra_tokens, scale)
            return scores, *prune_tokens(scores, x, out.transpose(1, 2).flatten(2), keep, extra_tokens), out, lse

        del table[select]
        table[torch.ops.pruneattn.prune_tokens.default] = prune_tokens
        table[torch.ops.pruneattn.prune_epilogue.default] = prune_epilogue
        table[torch.ops.pruneattn.cls_prune_tokens.default] = cls_prune_tokens
        table[torch.ops.pruneattn.pruned_attention.default] = pruned_attention
    return table


def _write_onnx(program, file, names, description):
    from onnxscript import opset18 as op

    def select_tokens(scores, keep):
        count = op.Constant(value_ints=[keep])
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
    onnx.model.metadata_props[KEY] = description
    onnx.save(file)


def _write_torch(program, file, names, description):
    torch.export.save(program, file, extra_files={DESCRIPTION_FILE: description})


def _write_aoti(program, file, names, description):
    settings = {"aot_inductor.metadata": {KEY: description}}
    torch._inductor.aoti_compile_and_package(program, package_path=str(file), inductor_configs=settings)


_WRITERS = {"onnx": _write_onnx, "torch": _write_torch, "aoti": _write_aoti}


def _check_file(file, format, kernels, wrapped, example, waveform):
    """Run a file as its users will; the largest relative difference from the model. Raises where it is too large."""
    runs = [_inputs(wrapped.model, example, waveform, batch) for batch in (1, 3)]
    with torch.no_grad():
        expected = torch.cat([wrapped(*inputs) for inputs in runs])  # [4, num_classes]
    outputs = _run_onnx(file, runs) if format == "onnx" else _run_elsewhere(file, runs, format, kernels)
    scale = expected.square().mean().sqrt()
    difference = ((torch.cat(outputs).to(expected) - expected).abs().max() / scale).item()
    if not difference < _TOLERANCE[wrapped.dtype]:
        raise UserError(
            f"the file in the format {format} was not kept, because it does not compute what the model does: its logits "
            f"differ by {difference:.2g} of their size"
        )
    return difference


def _run_onnx(file, runs):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    outputs = [session.run(None, {name: x.cpu().numpy() for name, x in zip(names, inputs)}) for inputs in runs]
    return [torch.from_numpy(output[0]) for output in outputs]


def _run_elsewhere(file, runs, format, kernels):
    arguments = file.with_name("arguments.pt")
    torch.save(runs, arguments)
    command = [sys.executable, "-c", _RUN_ELSEWHERE, str(file), str(arguments), format, str(kernels)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
        raise UserError(f"the file in the format {format} was not kept, because it does not run by itself: {reason}")
    return torch.load(arguments)
