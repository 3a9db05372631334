"""Weights of any known format into our models: :func:`load_checkpoint`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ..constants import PATCH
from ..errors import UserError
from ..models import name_of_size
from ..models.patches import Stride, check_stride, stride_text
from ..models.vit import PrunedViT, own_model
from .converters import QKV
from .positions import fit_positions
from .weights import Weights, read_weights

#: Keys that a checkpoint may lack: everything after the last block, except AST's final norm.
HEAD = ("head.", "head_norm.", "fc_norm.")


@dataclass
class LoadReport:
    """Result of :func:`load_checkpoint`. ``print`` shows a summary.

    Attributes:
        path: the file that was read.
        format: name of its format.
        converted: pairs ``(key in the file, our key)`` of the loaded tensors.
        missing: missing keys: our keys that keep their initial values.
        unused: unexpected keys: keys of the file that were not loaded.
        notes: changes to the loaded tensors and other remarks, in words.
    """

    path: str
    format: str
    converted: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.format}, {len(self.converted)} tensors loaded"]
        if self.missing:
            lines.append(f"  missing keys, left at their initial values: {_listed(self.missing)}")
        if self.unused:
            lines.append(f"  unexpected keys, not used: {_listed(self.unused)}")
        return "\n".join(lines + [f"  {note}" for note in self.notes])


def load_checkpoint(model: nn.Module, path: str | Path, stride: Stride | None = None) -> LoadReport:
    """Load weights of any known format into a model: all of them, or none on an error.

    Known formats are the official AST, pretrained and fine-tuned AudioMAE (the authors', the paper's, timm's),
    Hugging Face's AST (as saved, or with the module names of transformers 5) and pruneattn's own files; see
    ``converters.FORMATS``. Tensors are converted to the dtype of the model. Position tables are fitted to the frames
    and the stride of the model (:func:`~pruneattn.checkpoints.positions.fit_positions`). The model's head keeps its
    initial values if the head in the file has another number of classes.

    Args:
        model: a model of :func:`~pruneattn.create_model`; its parameters are changed in place.
        path: a file; a folder that holds ``best.safetensors``, ``model.safetensors`` or ``pytorch_model.bin``; or
            the name of a Hugging Face Hub repository with one of these, ``user/name`` or ``user/name@revision``.
        stride: stride of the patches of an AST checkpoint: one number, or ``(frequency, time)``. None: the stride that
            the file of this package or Hugging Face's ``config.json`` records; without a record, the stride that fits
            the size of the position table (:func:`~pruneattn.checkpoints.positions.guess_stride`). A size that fits
            several strides, such as 12 x 30 and 8 x 45 patches, is rejected. Positions of another stride than the
            model's are resampled, with a warning. Create the model with the stride of the checkpoint to keep them.

    Returns:
        A :class:`LoadReport` of converted, missing and unexpected keys.

    Raises:
        UserError: the file does not exist, is damaged, is unsafe to open, has no known format, does not fit the model,
            or has positions of an unknown stride. The model is unchanged then.
    """
    own = own_model(model, "load_checkpoint")
    given = None if stride is None else check_stride(stride)
    return load_weights(own, read_weights(path), given)


def load_weights(model: PrunedViT, weights: Weights, stride: tuple[int, int] | None = None) -> LoadReport:
    """Load weights that were read: see :func:`load_checkpoint`."""
    path, format_ = weights.path, weights.format
    if format_.family == "audiomae" and stride not in (None, (PATCH, PATCH)):
        raise UserError(
            f"{path}: {format_.name}, whose patches have a stride of {PATCH}, but stride is {stride_text(stride)}"
        )
    wanted, found = model.state_dict(), dict(weights.tensors)
    report = LoadReport(str(path), format_.name, unused=list(weights.unused))
    _check_trunk(weights, wanted, model)
    if stride is None:
        asked = None if model.stride == (PATCH, PATCH) else model.stride
        stride = weights.stride_for(model.name, model.frames, asked)
    try:
        found["pos_embed"], note = fit_positions(found["pos_embed"], model, stride=stride)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    report.notes += [note] if note else []
    left = _untie_head(found, wanted, report.notes)

    sources = weights.sources
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            raise UserError(
                f"{path}: {' + '.join(sources[name])} is {list(tensor.shape)} and the model's {name} "
                f"{list(wanted[name].shape)}; use a checkpoint of the model's own layout"
            )
    report.unused += [key for name in left for key in sources[name]]
    report.converted = [(key, name) for name in found for key in sources[name]]
    report.missing = [name for name in wanted if name not in found]
    model.load_state_dict(found, strict=False)
    return report


def load_complete(model: PrunedViT, weights: Weights, stride: tuple[int, int] | None = None) -> LoadReport:
    """Load weights by :func:`load_weights`; raise a ``UserError`` if a parameter keeps its initial value."""
    report, path = load_weights(model, weights, stride), weights.path
    if report.missing:
        fresh = [note for note in report.notes if note.startswith("head:")]
        why = fresh[0] if fresh else "it was never fine-tuned for a classification task"
        missing = _listed(sorted(report.missing), 4)
        raise UserError(f"{path} lacks {missing}: {why}. Fine-tune it first: pruneattn train --init {path}")
    return report


def _check_trunk(weights: Weights, wanted: Mapping[str, torch.Tensor], model: PrunedViT) -> None:
    """Raise ``UserError`` for a checkpoint of another family, width or depth, or with missing or additional parts."""
    weights.check_family(model.name)
    path, format_, found, family = weights.path, weights.format, weights.tensors, weights.format.family
    width, depth = found[QKV].shape[-1], _depth(found)
    if (width, depth) != (wanted[QKV].shape[-1], _depth(wanted)):
        raise UserError(
            f"{path}: embed_dim {width} and depth {depth} ({QKV} is {list(found[QKV].shape)}), but the model "
            f"{model.name} has embed_dim {wanted[QKV].shape[-1]} and depth {_depth(wanted)} "
            f"({list(wanted[QKV].shape)}); {_remedy(family, width, depth)}"
        )
    absent = [name for name in wanted if name not in found and not name.startswith(HEAD)]
    if absent:
        raise UserError(f"{path}: {format_.name}, but without {_listed(absent)}; use a complete checkpoint")
    excess = [name for name in found if name not in wanted]
    if excess:
        raise UserError(
            f"{path}: {format_.name}, but with parts that {model.name} does not have, so its logits would differ: "
            f"{_listed(excess)}; use a checkpoint of the plain model"
        )


def _untie_head(found: dict[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], notes: list[str]) -> list[str]:
    """Remove a head that the model cannot use from `found`, and return the removed names."""
    if "head.weight" not in found:
        return []
    classes, ours = len(found["head.weight"]), len(wanted["head.weight"])
    if classes != ours:
        notes.append(
            f"head: {classes} classes in the file and {ours} in the model, so the head keeps its initial values"
        )
    elif "fc_norm.weight" in wanted and "fc_norm.weight" not in found:
        notes.append(
            "head: trained with a norm before the mean, not with fc_norm, so the head keeps its initial values"
        )
    else:
        return []
    # The norm in the head also keeps its initial values, as in the official AST on a new task.
    left = [name for name in found if name.startswith(("head.", "head_norm."))]
    for name in left:
        del found[name]
    return left


def _depth(names: Iterable[str]) -> int:
    return len({name.split(".")[1] for name in names if name.startswith("blocks.")})


def _remedy(family: str, width: int, depth: int) -> str:
    """Describe the model that fits weights of this width and depth."""
    name = name_of_size(family, width, depth)
    if name is not None:
        return f"create the model with create_model({name!r})"
    return f"create the model with create_model('{family}_base', embed_dim={width}, depth={depth}, num_heads=...)"


def _listed(names: Sequence[str], most: int = 6) -> str:
    """List the first few names and the number of further names."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
