"""Our own files: one safetensors file with everything that a model needs to be used."""

import json
from pathlib import Path

from safetensors.torch import save_file

from ..constants import VERSION
from ..errors import UserError
from ..files import atomic_write
from ..models import create_model
from ..models.vit import own_model
from .card import make_card
from .folder import write_folder
from .hub import CONFIG
from .huggingface import load_from_config
from .state_files import find_file, is_safetensors, read_safetensors

FORMAT_VERSION = 1
_KEY = "pruneattn"  # of the metadata: JSON
_ABOUT = "a copy, for people, of what the metadata of model.safetensors holds; load_pretrained reads that one"


def save_pretrained(model, path, *, features, labels, multilabel, extra=None):
    """Write a model with its configuration, atomically, for :func:`load_pretrained`.

    A folder gets ``model.safetensors``, the model's card ``README.md`` (see :mod:`~pruneattn.checkpoints.card`; a README
    that somebody else wrote stays) and, for people to read, ``config.json``: what the Hugging Face Hub shows of a
    model. :func:`load_pretrained` reads nothing but the safetensors file, whose metadata hold the configuration.

    Args:
        model: from :func:`~pruneattn.create_model`.
        path: file to write if the name ends in ``.safetensors``, and its folder must exist; else a folder, which is
            made where it is absent.
        features: :class:`~pruneattn.data.fbank.FeatureConfig` of the model's input.
        labels: name of each class, in the order of the logits.
        multilabel: whether several classes can hold at once (sigmoid) or one does (softmax).
        extra: dict of further plain values to keep, such as the metric.

    Raises:
        UserError: the files cannot be written, the folder holds the ``config.json`` of something else, or the score is
            a function, which no file can hold.
        ValueError: labels or frames do not fit the model, or `extra` holds more than JSON can.
    """
    model, labels, path = own_model(model, "save_pretrained"), list(labels), Path(path)
    check_description(model, features, labels)
    content = {
        "format_version": FORMAT_VERSION,
        "pruneattn_version": VERSION,
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
    if path.suffix == ".safetensors" and not path.is_dir():
        with atomic_write(path) as temporary:
            save_file(state, temporary, metadata={"format": "pt", _KEY: text})
        return
    card = make_card(model, features, labels, multilabel, extra)
    configs = {CONFIG: {"about": _ABOUT, **content}}
    write_folder(path, state, configs, card, own="pruneattn_version", metadata={_KEY: text})


def check_description(model, features, labels):
    """Raise ``ValueError`` unless features and labels (None: not known) are those of the model."""
    if labels is not None and len(labels) != model.num_classes:
        raise ValueError(f"labels: expected {model.num_classes} names, one per class of the model, got {len(labels)}")
    if features.frames != model.frames:
        raise ValueError(f"features: expected {model.frames} frames, as the model has, got {features.frames}")


def load_pretrained(path):
    """Make the model that :func:`save_pretrained` wrote, or Hugging Face's AST, on the CPU, in evaluation mode.

    Args:
        path: the file; a folder that holds ``best.safetensors`` (a training run's) or ``model.safetensors``; or the
            name of such a repository on the Hugging Face Hub, ``user/name`` or ``user/name@revision`` (branch, tag or
            commit), which is downloaded into the Hub's cache. With ``HF_HUB_OFFLINE=1`` it must be there. What exists
            here goes before what the Hub has by that name. An AST of Hugging Face's is known by the ``config.json``
            beside its weights, and is pruned as ``pruneattn`` in it says, else unpruned.

    Returns:
        The model, with ``model.features`` (:class:`~pruneattn.data.fbank.FeatureConfig`), ``model.labels`` (list of
        str), ``model.multilabel`` (bool) and ``model.extra`` (dict).

    Raises:
        UserError: there is no such file here nor on the Hub, or it is damaged, of no such model, or of a later version
            of pruneattn.
    """
    path = find_file(path)
    state, metadata = read_safetensors(path) if is_safetensors(path) else (None, {})
    if _KEY in metadata:
        return _rebuild(path, state, metadata[_KEY])
    del state
    model = load_from_config(path)
    if model is None:
        raise UserError(
            f"{path}: not a model that pruneattn saved, so it does not say how to make it, nor does a {CONFIG} of "
            "Hugging Face's AST beside it; make the model with create_model and use load_checkpoint (on the command "
            "line: --model NAME)"
        )
    return model


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
            f"is pruneattn {VERSION}, which reads version {FORMAT_VERSION}: install a matching one"
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
