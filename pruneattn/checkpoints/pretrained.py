"""pruneattn's own checkpoints: one safetensors file with everything that is needed to use a model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from ..constants import PATCH, VERSION, patch_grid
from ..data.fbank import FeatureConfig
from ..errors import UserError
from ..files import atomic_write
from ..models import create_model
from ..models.description import Description
from ..models.patches import Stride, check_stride
from ..models.vit import PrunedViT, own_model
from .card import make_card
from .folder import write_folder
from .hub import CONFIG
from .huggingface import create_from_config, read_config, statistics_given, stride_of
from .load_checkpoint import load_complete
from .quantized import restore, state_of, to_plain
from .state_files import METADATA, dequantized, find_file, is_safetensors, read_metadata, read_safetensors
from .weights import read_weights

#: Versions of the file format. Version 2 has the key ``stride`` in ``model``; a stride of 16 is saved as version 1.
#: Version 3 has 8-bit weights and the key ``quantization``.
FORMAT_VERSIONS = (1, 2, 3)
_ABOUT = "a readable copy of the metadata of model.safetensors; load_pretrained reads the metadata, not this file"


def save_pretrained(
    model: nn.Module,
    path: str | Path,
    *,
    features: FeatureConfig | None = None,
    labels: Sequence[str] | None = None,
    multilabel: bool | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a model with its configuration, atomically, for :func:`load_pretrained`.

    A folder gets three files: ``model.safetensors``, the model card ``README.md`` (see
    :mod:`~pruneattn.checkpoints.card`; a README of another origin or an edited card is kept), and ``config.json``, a
    readable copy of the configuration that the Hugging Face Hub shows. :func:`load_pretrained` reads only the
    safetensors file. Its metadata contains the configuration.

    Args:
        model: a model of :func:`~pruneattn.create_model`. If it has 8-bit weights, these are saved, and
            ``load_pretrained`` gives the optimized model again.
        path: a file to write if the name ends in ``.safetensors``; its folder must exist. Else a folder, which is
            created if it does not exist.
        features: :class:`~pruneattn.data.fbank.FeatureConfig` of the model's input. None: ``model.features``.
        labels: name of each class, in the order of the logits. None: ``model.labels``.
        multilabel: True if a clip can have several classes (sigmoid), False if it has exactly one (softmax). None:
            ``model.multilabel``.
        extra: further plain values to save, such as the metric. None: no values. ``model.extra`` is not saved unless
            you pass it, since it describes the weights that were loaded.

    Raises:
        UserError: the files cannot be written, the folder holds another kind of ``config.json``, features, labels or
            multilabel are neither given nor known to the model, or the score is a function, which no file can hold.
        ValueError: labels or features do not fit the model, or JSON cannot hold `extra`.
    """
    own, path = own_model(model, "save_pretrained"), Path(path)
    description = complete_description(own, features, labels, multilabel, extra)
    unknown = [name for name in ("features", "labels", "multilabel") if getattr(description, name) is None]
    if description.features is None or unknown:
        raise UserError(f"save_pretrained: the model has no {', '.join(unknown)}; pass them as arguments")
    content = {
        "format_version": _format_version(own),
        "pruneattn_version": VERSION,
        "model": own.config,
        "features": description.features.to_dict(),
        "labels": description.labels,
        "multilabel": bool(description.multilabel),
        "extra": description.extra,
    }
    if own.quantization is not None:
        content["quantization"] = to_plain(own.quantization)
    try:
        text = json.dumps(content, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"extra, labels: expected plain finite values that JSON can hold ({error})") from error
    state = state_of(own)
    if path.suffix == ".safetensors" and not path.is_dir():
        with atomic_write(path) as temporary:
            save_file(state, temporary, metadata={"format": "pt", METADATA: text})
        return
    configs = {CONFIG: {"about": _ABOUT, **content}}
    write_folder(path, state, configs, make_card(own, description), own="pruneattn_version", metadata={METADATA: text})


def _format_version(model: PrunedViT) -> int:
    if model.quantization is not None:
        return 3
    return 1 if model.stride == (PATCH, PATCH) else 2


def complete_description(
    model: PrunedViT,
    features: FeatureConfig | None,
    labels: Sequence[str] | None,
    multilabel: bool | None,
    extra: Mapping[str, Any] | None = None,
) -> Description:
    """Return a description of the given values, with the model's own values in place of None.

    Raises:
        ValueError: labels or features do not fit the model.
    """
    own = model.description
    features = own.features if features is None else features
    labels = own.labels if labels is None else labels
    if labels is not None and len(labels) != model.num_classes:
        raise ValueError(f"labels: expected {model.num_classes} names, one per class of the model, got {len(labels)}")
    if features is not None and features.frames != model.frames:
        raise ValueError(f"features: expected {model.frames} frames, as the model has, got {features.frames}")
    return Description(
        features=features,
        labels=None if labels is None else list(labels),
        multilabel=own.multilabel if multilabel is None else multilabel,
        extra=dict(extra or {}),
    )


def load_pretrained(
    path: str | Path, *, stride: Stride | None = None, mean: float | None = None, std: float | None = None
) -> PrunedViT:
    """Load a model that :func:`save_pretrained` wrote, or Hugging Face's AST, on the CPU, in evaluation mode.

    Args:
        path: a file; a folder that holds ``best.safetensors`` (of a training run) or ``model.safetensors``; or the
            name of a Hugging Face Hub repository with one of these, ``user/name`` or ``user/name@revision`` (a branch,
            tag or commit). Its files are downloaded into the Hub's cache. With ``HF_HUB_OFFLINE=1`` they must be in the
            cache. A local path takes precedence over a repository of the same name. Hugging Face's AST is recognized by
            the ``config.json`` next to its weights. It is pruned with the arguments in the entry ``pruneattn``, and not
            pruned if there is no such entry.
        stride: stride of the model's patches: one number, or ``(frequency, time)``. None: the stride of the checkpoint,
            which keeps its positions. They are resampled for another stride, with a warning, and 8-bit weights are
            dequantized.
        mean, std: statistics of the log-mel values of the training data, for a folder of Hugging Face's AST without
            ``preprocessor_config.json``. None: AudioSet's, with a warning, if the labels are those of AudioSet.

    Returns:
        The model. Its description holds ``model.features`` (:class:`~pruneattn.data.fbank.FeatureConfig`),
        ``model.labels`` (list of str), ``model.multilabel`` (bool) and ``model.extra`` (dict).

    Raises:
        UserError: neither a local file nor the Hub has this name; or the file is damaged, has another format, or was
            written by a later version of pruneattn; or the statistics of the input are unknown, or given although the
            checkpoint contains them.
    """
    asked = None if stride is None else check_stride(stride)
    path = find_file(path)
    text = read_metadata(path).get(METADATA) if is_safetensors(path) else None
    if text is not None:
        for name, value in (("mean", mean), ("std", std)):
            if value is not None:
                raise statistics_given(name)
        return _rebuild(path, text, asked)
    config = read_config(path)
    if config is None:
        raise UserError(
            f"{path}: not a model that pruneattn saved, and not next to a {CONFIG} of Hugging Face's AST, so its "
            "configuration is unknown; create the model with create_model and use load_checkpoint (on the command "
            "line: --model NAME)"
        )
    model, weights = create_from_config(config, path, asked, mean, std), read_weights(path)
    own_stride = stride_of(config, path)
    grid = patch_grid(model.frames, own_stride)
    if weights.patches != math.prod(grid):
        raise UserError(
            f"{path}: {weights.patches} patches, but {CONFIG} describes {grid[1]} x {grid[0]}; use the files of one "
            "model"
        )
    load_complete(model, weights, own_stride)
    return model.eval()


def _rebuild(path: Path, text: str, stride: tuple[int, int] | None) -> PrunedViT:
    """Make the model of a file of :func:`save_pretrained`, with its own stride or with another."""
    try:
        content = json.loads(text)
        version = content["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: its configuration is not readable ({error}); save the model again") from error
    if version not in FORMAT_VERSIONS:
        raise UserError(
            f"{path}: written in format version {version} by pruneattn {content.get('pruneattn_version', '?')}; this "
            f"is pruneattn {VERSION}, which reads versions {', '.join(map(str, FORMAT_VERSIONS))}: install a "
            "matching version"
        )
    try:
        model = create_model(**content["model"])
        model.description = Description(
            features=FeatureConfig.from_dict(content["features"]),
            labels=list(content["labels"]),
            multilabel=bool(content["multilabel"]),
            extra=dict(content["extra"]),
        )
        if stride in (None, model.stride):
            state = read_safetensors(path)[0]
            model.load_state_dict(dequantized(state))
            if version == 3:
                restore(model, state, content["quantization"])
            return model.eval()
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())  # load_state_dict writes several lines
        raise UserError(
            f"{path}: its configuration and its weights do not match ({reason}); save the model again"
        ) from error
    other = create_model(**{**model.config, "stride": stride})
    other.description = model.description
    load_complete(other, read_weights(path), model.stride)
    return other.eval()
