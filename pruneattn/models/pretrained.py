"""Our own files: one safetensors file with everything that a model needs to be used."""

import json
from pathlib import Path

from safetensors.torch import save_file

from .. import __version__
from ..errors import UserError
from ..io import atomic_write
from . import create_model
from .state_files import find_file, is_safetensors, read_safetensors

FILES = ("best.safetensors", "model.safetensors")
FORMAT_VERSION = 1
_KEY = "pruneattn"  # of the metadata: JSON


def save_pretrained(model, path, *, features, labels, multilabel, extra=None):
    """Write a model with its configuration, atomically, for :func:`load_pretrained`.

    Args:
        model: from :func:`~pruneattn.create_model`.
        path: file to write, as ``best.safetensors``; its folder must exist.
        features: :class:`~pruneattn.data.fbank.FeatureConfig` of the model's input.
        labels: name of each class, in the order of the logits.
        multilabel: whether several classes can hold at once (sigmoid) or one does (softmax).
        extra: dict of further plain values to keep, such as the metric.

    Raises:
        UserError: the file cannot be written, or the score is a function, which no file can hold.
        ValueError: labels or frames do not fit the model, or `extra` holds more than JSON can.
    """
    labels = list(labels)
    if len(labels) != model.num_classes:
        raise ValueError(f"labels: expected {model.num_classes} names, one per class of the model, got {len(labels)}")
    if features.frames != model.frames:
        raise ValueError(f"features: expected {model.frames} frames, as the model has, got {features.frames}")
    content = {
        "format_version": FORMAT_VERSION,
        "pruneattn_version": __version__,
        "model": model.config,
        "features": features.to_dict(),
        "labels": labels,
        "multilabel": bool(multilabel),
        "extra": dict(extra or {}),
    }
    try:
        text = json.dumps(content, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"extra, labels: expected plain finite values that JSON can hold ({error})") from error
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with atomic_write(path) as temporary:
        save_file(state, temporary, metadata={"format": "pt", _KEY: text})


def load_pretrained(path):
    """Make the model that :func:`save_pretrained` wrote, on the CPU, in evaluation mode.

    Args:
        path: the file, or a folder that holds ``best.safetensors`` (a training run's) or ``model.safetensors``.

    Returns:
        The model, with ``model.features`` (:class:`~pruneattn.data.fbank.FeatureConfig`), ``model.labels`` (list of
        str), ``model.multilabel`` (bool) and ``model.extra`` (dict).

    Raises:
        UserError: the file is missing, damaged, not pruneattn's, or of a later version of pruneattn.
    """
    path = find_file(path, FILES)
    state, metadata = read_safetensors(path) if is_safetensors(path) else (None, {})
    if _KEY not in metadata:
        raise UserError(
            f"{path}: not a model that pruneattn saved, so it does not say how to make it; "
            "make the model with create_model and use load_checkpoint (on the command line: --model NAME)"
        )
    return _rebuild(path, state, metadata[_KEY])


def _rebuild(path: Path, state, text):
    from ..data.fbank import FeatureConfig

    try:
        content = json.loads(text)
        version = content["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: its configuration is not readable ({error}); save the model again") from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: written in format version {version} by pruneattn {content.get('pruneattn_version', '?')}; this "
            f"is pruneattn {__version__}, which reads version {FORMAT_VERSION}: install a matching one"
        )
    try:
        model = create_model(**content["model"])
        model.features = FeatureConfig.from_dict(content["features"])
        model.labels = list(content["labels"])
        model.multilabel, model.extra = bool(content["multilabel"]), dict(content["extra"])
        model.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())  # load_state_dict writes several lines
        raise UserError(
            f"{path}: its configuration and its weights do not make a model ({reason}); save the model again"
        ) from error
    return model.eval()
