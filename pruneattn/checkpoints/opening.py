"""Checkpoints of any origin as models that know their features and labels, and datasets that fit them."""

import dataclasses
import hashlib
import json

import torch

from ..data import FeatureConfig, load_dataset
from ..data.catalog import dataset_info
from ..data.manifest import read_label_csv
from ..errors import UserError
from ..models import create_model
from .load_checkpoint import load_complete
from .pretrained import load_pretrained


def open_checkpoint(
    checkpoint,
    *,
    model=None,
    dataset="as20k",
    num_classes=None,
    frames=None,
    mean=None,
    std=None,
    padding="zero",
    score=None,
):
    """Open a checkpoint of this package, or with ``model`` one of another project, in eval mode on the CPU.

    Args:
        checkpoint: path or Hub name, as of :func:`~pruneattn.load_pretrained`; with ``model`` the path or Hub name of
            any file that :func:`~pruneattn.load_checkpoint` reads.
        model: name of the model that the weights are for, such as ``"ast_base"``; None for checkpoints that say it
            themselves.
        dataset: name of the dataset that the checkpoint was trained for. It gives the values that are None below.
        num_classes: classes of the head.
        frames: 10 ms frames of the input.
        mean: mean of the log-mel values of the training data.
        std: their standard deviation.
        padding: ``"zero"`` or ``"min"``, the value after a short clip.
        score: ranks the patches; None: the checkpoint's.

    Returns:
        ``PrunedViT`` whose ``description`` has features; labels are None where unknown.

    Raises:
        UserError: the checkpoint cannot be opened, or ``num_classes``, ``frames``, ``mean`` or ``std`` are given for a
            checkpoint that says them itself.
    """
    if model is None:
        for option, value in {"num_classes": num_classes, "frames": frames, "mean": mean, "std": std}.items():
            if value is not None:
                raise UserError(f"--{option.replace('_', '-')} is for checkpoints of other projects, with --model")
        opened = load_pretrained(checkpoint)
    else:
        opened = _open_foreign(checkpoint, model, dataset, num_classes, frames, mean, std, padding)
    if score is not None and score != opened.score:
        opened = reconfigured(opened, score=score)
    return opened.eval()


def class_names(model, label_csv):
    """Names of an opened checkpoint's classes: of a label CSV, else its own; None where it has none."""
    if label_csv is None:
        return model.labels
    _, names = read_label_csv(label_csv)
    if len(names) != model.num_classes:
        raise UserError(f"{label_csv} names {len(names)} classes, the checkpoint has {model.num_classes}")
    return names


def reconfigured(model, **changes):
    """An opened checkpoint's weights in a model of another ``score``, ``prune_blocks`` or ``keep_rate``, in eval mode."""
    other = create_model(**{**model.config, **changes})
    other.load_state_dict(model.state_dict())
    other.description = dataclasses.replace(model.description)
    return other.to(next(model.parameters()).device).eval()


def open_dataset(model, checkpoint, dataset, split="test", **options):
    """A dataset for an opened checkpoint: the same classes and as many frames.

    Args:
        model: opened checkpoint; one without labels takes the dataset's.
        checkpoint: its name, for messages.
        dataset: name of a dataset.
        split: ``"train"``, ``"val"`` or ``"test"``.
        options: further arguments of :func:`~pruneattn.data.load_dataset`.

    Raises:
        UserError: the dataset cannot be opened, or its classes are not the model's.
    """
    opened = load_dataset(dataset, split, frames=model.frames, **options)
    where = f"{checkpoint} and the dataset {dataset} do not go together:"
    if model.num_classes != opened.num_classes:
        raise UserError(f"{where} the checkpoint has {model.num_classes} classes, the dataset {opened.num_classes}")
    if model.labels is None:
        model.labels, model.multilabel = opened.labels, opened.multilabel
    for number, (ours, theirs) in enumerate(zip(model.labels, opened.labels)):
        if ours != theirs:
            raise UserError(f"{where} class {number} is {ours!r} in the checkpoint and {theirs!r} in the dataset")
    return opened


def describe(model):
    """A model in a few words: name, input and head."""
    return f"{model.name}, {model.frames} frames ({model.num_patches} patches), {model.num_classes} classes"


def fingerprint(model):
    """SHA-256 of all of an opened checkpoint that decides over its labels, but for the keep-rate."""
    config = {name: value for name, value in model.config.items() if name != "keep_rate"}
    known = [config, model.features.to_dict(), model.labels, model.multilabel]
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _open_foreign(checkpoint, name, dataset, num_classes, frames, mean, std, padding):
    info = dataset_info(dataset)
    num_classes = info.num_classes if num_classes is None else num_classes
    if num_classes is None:
        raise UserError(f"the dataset {dataset} does not fix the number of classes: give --num-classes")
    model = create_model(name, num_classes=num_classes, frames=info.frames if frames is None else frames)
    load_complete(model, checkpoint)
    model.features = FeatureConfig(
        frames=model.frames,
        mean=info.mean if mean is None else mean,
        std=info.std if std is None else std,
        padding=padding,
    )
    model.labels, model.multilabel = None, bool(info.multilabel)
    return model
