"""Weights of others into our models: :func:`load_checkpoint`."""

from dataclasses import dataclass, field

import torch

from ..constants import PATCH
from ..errors import UserError
from ..models import name_of_size
from ..models.vit import own_model
from .converters import QKV, detect_format
from .positions import fit_positions
from .state_files import find_file, read_state

# What may be absent from a checkpoint: everything behind the last block but AST's final norm.
HEAD = ("head.", "head_norm.", "fc_norm.")


@dataclass
class LoadReport:
    """What :func:`load_checkpoint` did.

    Attributes:
        path: the file that was read.
        format: name of its format.
        converted: ``(key in the file, our key)`` of everything that was loaded.
        missing: our keys that keep their initial values.
        unused: keys of the file that were not loaded.
        notes: what was changed on the way or is worth knowing, in words.
    """

    path: str
    format: str
    converted: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self):
        lines = [f"{self.path}: {self.format}, {len(self.converted)} tensors loaded"]
        if self.missing:
            lines.append(f"  left at their initial values: {_listed(self.missing)}")
        if self.unused:
            lines.append(f"  not used: {_listed(self.unused)}")
        return "\n".join(lines + [f"  {note}" for note in self.notes])


def load_checkpoint(model, path, stride=None):
    """Load weights of any known format into `model`, completely or not at all.

    Known are the official AST, AudioMAE pre-trained and fine-tuned (the authors', the paper's, timm's), Hugging Face's
    AST (as saved, or the module names of transformers 5) and pruneattn's own files; see ``converters.FORMATS``.
    Stored half precision is converted to the model's. Positions are fitted to the model's frames
    (:func:`~pruneattn.checkpoints.positions.fit_positions`). A head of another number of classes stays fresh.

    Args:
        model: from :func:`~pruneattn.create_model`; its parameters are changed in place.
        path: a file; a folder that holds ``best.safetensors``, ``model.safetensors`` or ``pytorch_model.bin``; or
            the name of such a repository on the Hugging Face Hub, ``user/name`` or ``user/name@revision``.
        stride: of an AST checkpoint's patches, 10 or 16, where the size of its position table does not tell: 12 x 50
            patches of stride 10 are as many as 8 x 75 of 16. None: by the size (``fit_positions`` says how).

    Returns:
        A :class:`LoadReport`; ``print`` shows it.

    Raises:
        UserError: the file is missing, damaged, unsafe to open, of no known format, or does not fit the model. The
            model is unchanged then.
    """
    model = own_model(model, "load_checkpoint")
    if stride not in (None, PATCH, 10):
        raise UserError(f"stride: expected 10, 16 or None, got {stride!r}")
    path = find_file(path)
    state = read_state(path)
    format_ = detect_format(state, path)
    if not format_.strided and stride == 10:
        raise UserError(f"{path}: {format_.name}, whose patches have a stride of 16, and stride is 10")
    wanted = model.state_dict()
    sources, unused = format_.sources(state)
    found = {name: _joined([state[key] for key in keys], keys, path) for name, keys in sources.items()}
    report = LoadReport(str(path), format_.name, unused=unused)

    _check_trunk(found, wanted, model, format_, path)
    try:
        found["pos_embed"], note = fit_positions(found["pos_embed"], model, stride=stride if format_.strided else PATCH)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    report.notes += [note] if note else []
    left = _untie_head(found, wanted, report.notes)

    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            raise UserError(
                f"{path}: {' + '.join(sources[name])} is {list(tensor.shape)} and the model's {name} "
                f"{list(wanted[name].shape)}; give a checkpoint of the model's own layout"
            )
    report.unused += [key for name in left for key in sources[name]]
    report.converted = [(key, name) for name in found for key in sources[name]]
    report.missing = [name for name in wanted if name not in found]
    model.load_state_dict(found, strict=False)
    return report


def load_complete(model, path, stride=None):
    """:func:`load_checkpoint` of weights with a head: what leaves a parameter at its initial value is refused."""
    report = load_checkpoint(model, path, stride)
    if report.missing:
        fresh = [note for note in report.notes if note.startswith("head:")]
        why = fresh[0] if fresh else "it was never fine-tuned for a task of its own"
        missing = _listed(sorted(report.missing), 4)
        raise UserError(f"{path} lacks {missing}: {why}. Train it first: python -m pruneattn.train --init")
    return report


def _joined(tensors, keys, path):
    """One tensor of its parts, such as query, key and value."""
    if len(tensors) == 1:
        return tensors[0]
    try:
        return torch.cat(tensors)
    except RuntimeError as error:
        shapes = ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in zip(keys, tensors, strict=True))
        raise UserError(f"{path}: parts of one layer do not fit together: {shapes}; download it again") from error


def _check_trunk(found, wanted, model, format_, path):
    """Refuse a checkpoint of another family, width or depth, or with other parts than the model."""
    family = model.name.partition("_")[0]
    if format_.family != family:
        raise UserError(
            f"{path}: {format_.name}, which does not fit the model {model.name}; make an "
            f"{format_.family} model, such as create_model({format_.family + '_base'!r})"
        )
    width, depth = found[QKV].shape[-1], _depth(found)
    if (width, depth) != (wanted[QKV].shape[-1], _depth(wanted)):
        raise UserError(
            f"{path}: embed_dim {width} and depth {depth} ({QKV} is {list(found[QKV].shape)}), where the model "
            f"{model.name} has embed_dim {wanted[QKV].shape[-1]} and depth {_depth(wanted)} "
            f"({list(wanted[QKV].shape)}); {_remedy(family, width, depth)}"
        )
    absent = [name for name in wanted if name not in found and not name.startswith(HEAD)]
    if absent:
        raise UserError(f"{path}: {format_.name}, but without {_listed(absent)}; give a complete checkpoint")
    excess = [name for name in found if name not in wanted]
    if excess:
        raise UserError(
            f"{path}: {format_.name}, but with parts that {model.name} has no place for, so that its answers would "
            f"not be the same: {_listed(excess)}; give a checkpoint of the plain model"
        )


def _untie_head(found, wanted, notes):
    """Take heads that cannot be used out of `found`; their names are returned."""
    if "head.weight" not in found:
        return []
    classes, ours = len(found["head.weight"]), len(wanted["head.weight"])
    if classes != ours:
        notes.append(f"head: {classes} classes in the file and {ours} in the model, so the head starts fresh")
    elif "fc_norm.weight" in wanted and "fc_norm.weight" not in found:
        notes.append("head: trained behind a norm before the mean, not behind fc_norm, so the head starts fresh")
    else:
        return []
    # As the official AST does for a new task, the norm in the head starts over with it.
    left = [name for name in found if name.startswith(("head.", "head_norm."))]
    for name in left:
        del found[name]
    return left


def _depth(names):
    return len({name.split(".")[1] for name in names if name.startswith("blocks.")})


def _remedy(family, width, depth):
    """Which model to make for weights of this width and depth."""
    name = name_of_size(family, width, depth)
    if name is not None:
        return f"make create_model({name!r})"
    return f"make create_model('{family}_base', embed_dim={width}, depth={depth}, num_heads=...)"


def _listed(names, most=6):
    """Names in short: the first few and how many more."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
