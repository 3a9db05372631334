"""Any checkpoint as a model with features and labels, and datasets with the same classes."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from ..constants import PATCH
from ..data import FeatureConfig, load_dataset
from ..data.catalog import dataset_info
from ..data.clips import ClipDataset
from ..data.manifest import read_label_csv
from ..errors import UserError
from ..models import create_model
from ..models.description import Description
from ..models.patches import Stride, stride_text
from ..models.vit import PrunedViT
from .load_checkpoint import load_complete
from .pretrained import load_pretrained
from .quantized import state_of
from .weights import read_weights


def open_checkpoint(
    checkpoint: str | Path,
    *,
    model: str | None = None,
    dataset: str = "as20k",
    stride: Stride | None = None,
    num_classes: int | None = None,
    frames: int | None = None,
    mean: float | None = None,
    std: float | None = None,
    padding: str | None = None,
    score: str | None = None,
) -> PrunedViT:
    """Open a checkpoint of this package, or with ``model`` one of another project, in eval mode on the CPU.

    Args:
        checkpoint: path or Hub name, as for :func:`~pruneattn.load_pretrained`; with ``model`` the path or Hub name of
            any file that :func:`~pruneattn.load_checkpoint` reads.
        model: name of the model that the weights are for, such as ``"ast_base"``; None for checkpoints that contain
            their configuration. ``num_classes``, ``frames`` and ``padding`` apply only with ``model``.
        dataset: name of the dataset that the checkpoint was trained for. With ``model``, it supplies the arguments
            below that are None, except the stride.
        stride: stride of the model's patches: one number, or ``(frequency, time)``. None: the checkpoint's own stride.
        num_classes: classes of the head.
        frames: number of 10 ms frames of the input.
        mean: mean of the log-mel values of the training data. Without ``model``, mean and std apply only to folders of
            Hugging Face's AST without ``preprocessor_config.json``.
        std: standard deviation of these values.
        padding: value after a short clip: ``"zero"`` (default), or ``"min"`` for the smallest log-mel value.
        score: score that ranks the patches; None: the checkpoint's.

    Returns:
        The model. ``model.features`` is set; ``model.labels`` is None if the names of the classes are unknown.

    Raises:
        UserError: the checkpoint cannot be opened, or an argument does not apply to it.
    """
    if model is None:
        given = {"num_classes": num_classes, "frames": frames, "padding": padding}
        for name, value in given.items():
            if value is not None:
                option = f"--{name.replace('_', '-')}"
                raise UserError(
                    f"{name} ({option}) applies only with model (--model), to checkpoints of other projects"
                )
        opened = load_pretrained(checkpoint, stride=stride, mean=mean, std=std)
    else:
        opened = _open_foreign(checkpoint, model, dataset, stride, num_classes, frames, mean, std, padding or "zero")
    if score is not None and score != opened.score:
        opened = reconfigured(opened, score=score)
    return opened.eval()


def class_names(model: PrunedViT, label_csv: str | Path | None) -> list[str] | None:
    """Return the class names of a label CSV if one is given, else the model's own; None if it has none."""
    if label_csv is None:
        return model.labels
    _, names = read_label_csv(label_csv)
    if len(names) != model.num_classes:
        raise UserError(f"{label_csv} names {len(names)} classes, the checkpoint has {model.num_classes}")
    return names


def reconfigured(model: PrunedViT, **changes: Any) -> PrunedViT:
    """Copy a model with another ``score``, ``prune_blocks`` or ``keep_rate``, on the same device, in eval mode."""
    other = create_model(**{**model.config, **changes})
    other.load_state_dict(model.state_dict())
    other.description = copy.deepcopy(model.description)
    return other.to(next(model.parameters()).device).eval()


def open_dataset(
    model: PrunedViT, checkpoint: str | Path, dataset: str, split: str = "test", **options: Any
) -> ClipDataset:
    """Open a dataset with the classes and frames of an opened checkpoint.

    Args:
        model: the opened checkpoint. A model without labels gets the labels of the dataset.
        checkpoint: name of the checkpoint, for error messages.
        dataset: name of a dataset.
        split: ``"train"``, ``"val"`` or ``"test"``.
        options: further arguments of :func:`~pruneattn.data.load_dataset`.

    Raises:
        UserError: the dataset cannot be opened, or its classes differ from the model's.
    """
    opened = load_dataset(dataset, split, frames=model.frames, **options)
    where = f"{checkpoint} and the dataset {dataset} do not match:"
    if model.num_classes != opened.num_classes:
        raise UserError(f"{where} the checkpoint has {model.num_classes} classes, the dataset {opened.num_classes}")
    if model.labels is None:
        model.labels, model.multilabel = opened.labels, opened.multilabel
    for number, (ours, theirs) in enumerate(zip(model.labels, opened.labels, strict=True)):
        if ours != theirs:
            raise UserError(f"{where} class {number} is {ours!r} in the checkpoint and {theirs!r} in the dataset")
    return opened


def describe(model: PrunedViT) -> str:
    """Describe a model in a few words: name, stride if it is not 16, input and head."""
    stride = "" if model.stride == (PATCH, PATCH) else f"stride {stride_text(model.stride)}, "
    return f"{model.name}, {stride}{model.frames} frames ({model.num_patches} patches), {model.num_classes} classes"


def fingerprint(model: PrunedViT) -> str:
    """Return a SHA-256 digest of everything in an opened checkpoint that determines its labels, except the keep-rate.

    Label files hold this digest, so it must not change between versions.

    Raises:
        ValueError: the model has no features.
    """
    if model.features is None:
        raise ValueError("fingerprint: the model has no features")
    config = {name: value for name, value in model.config.items() if name != "keep_rate"}
    known = [config, model.features.to_dict(), model.labels, model.multilabel]
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    for name, tensor in sorted(state_of(model).items()):
        digest.update(name.encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _open_foreign(
    checkpoint: str | Path,
    name: str,
    dataset: str,
    stride: Stride | None,
    num_classes: int | None,
    frames: int | None,
    mean: float | None,
    std: float | None,
    padding: str,
) -> PrunedViT:
    """Open weights of another project in a model of this name; the dataset supplies the values that are None."""
    info = dataset_info(dataset)
    num_classes = info.num_classes if num_classes is None else num_classes
    if num_classes is None:
        raise UserError(
            f"the dataset {dataset} does not determine the number of classes; pass num_classes (--num-classes)"
        )
    frames = info.frames if frames is None else frames
    weights = read_weights(checkpoint)
    of_table = weights.stride_for(name, frames, stride)
    model = create_model(name, num_classes=num_classes, frames=frames, stride=of_table if stride is None else stride)
    load_complete(model, weights, of_table)
    features = FeatureConfig(
        frames=model.frames,
        mean=info.mean if mean is None else mean,
        std=info.std if std is None else std,
        padding=padding,
    )
    model.description = Description(features, multilabel=bool(info.multilabel))
    return model
