"""Hugging Face's AST, as ``config.json`` and ``preprocessor_config.json`` next to the weights describe it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..constants import AUDIOSET_MEAN, AUDIOSET_STD, MEL_BINS, PATCH, patch_grid
from ..data.fbank import FeatureConfig
from ..errors import UserError, warn_caller
from ..models import create_model, name_of_size
from ..models.blocks import MLP_RATIO
from ..models.description import Description
from ..models.patches import check_stride
from ..models.scores import ADAPTED_SCORES
from ..models.vit import PrunedViT
from .hub import CONFIG, PREPROCESSOR

MODEL_TYPE = "audio-spectrogram-transformer"
_MULTILABEL, _SINGLE = "multi_label_classification", "single_label_classification"
_PRUNE_BLOCKS = (3, 6, 9)


def to_config(model: PrunedViT, description: Description) -> dict[str, Any]:
    """Return the ``config.json`` of a model.

    Its entry ``pruneattn`` holds the arguments of :func:`~pruneattn.prune`. transformers keeps the entry as
    ``model.config.pruneattn`` and does not use it. The entry names the pruning blocks ``blocks``, since older
    versions of pruneattn read only that name.

    transformers has a single ``layer_norm_eps``. It is 1e-6 here, the value of every norm except the head's (1e-5);
    this changes the head's output by about 5e-6.

    Args:
        model: an AST.
        description: labels of the model (None: numbered labels) and whether it is multilabel (None: no
            ``problem_type``, which transformers treats as single-label).
    """
    labels = description.labels
    if labels is None:
        labels = [f"LABEL_{number}" for number in range(model.num_classes)]
    config = {
        "architectures": ["ASTForAudioClassification"],
        "model_type": MODEL_TYPE,
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": model.num_heads,
        "intermediate_size": MLP_RATIO * model.embed_dim,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "patch_size": PATCH,
        "frequency_stride": model.stride[0],
        "time_stride": model.stride[1],
        "max_length": model.frames,
        "num_mel_bins": MEL_BINS,
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
        "torch_dtype": str(model.get_parameter("head.weight").dtype).removeprefix("torch."),
    }
    if model.prune_blocks and model.score in ADAPTED_SCORES:
        blocks, rates = list(model.prune_blocks), list(model.keep_rates)
        config["pruneattn"] = {"keep_rate": rates, "blocks": blocks, "score": model.score}
    if description.multilabel is not None:
        config["problem_type"] = _MULTILABEL if description.multilabel else _SINGLE
    return config


def read_config(path: Path) -> dict[str, Any] | None:
    """Read the ``config.json`` next to weights; None if there is none of an AST.

    Args:
        path: the weights.
    """
    place = path.with_name(CONFIG)
    config = _read(place) if place.is_file() else {}
    return config if config.get("model_type") == MODEL_TYPE else None


def stride_of(config: Mapping[str, Any], path: Path) -> tuple[int, int]:
    """Stride ``(frequency, time)`` of a configuration, which is next to the weights `path`."""
    try:
        return check_stride((config.get("frequency_stride", 10), config.get("time_stride", 10)))
    except UserError as error:
        raise UserError(f"{path.with_name(CONFIG)}: {error}") from error


def create_from_config(
    config: Mapping[str, Any], path: Path, stride: tuple[int, int] | None, mean: float | None, std: float | None
) -> PrunedViT:
    """Create the model of a configuration with random weights, pruned with the arguments in its entry ``pruneattn``.

    Args:
        config: result of :func:`read_config`.
        path: the weights, for the files next to them.
        stride: stride of the model; None: that of the configuration.
        mean, std: statistics of the log-mel values, for a folder without ``preprocessor_config.json``.

    Returns:
        The model with its description. ``model.multilabel`` follows ``problem_type``; it is False if that is absent, as
        in transformers.

    Raises:
        UserError: this package cannot build the model, or its features are unknown.
    """
    own_stride = stride_of(config, path)
    try:
        model, labels = _make(config, stride or own_stride)
    except (KeyError, TypeError, ValueError) as error:
        place = path.with_name(CONFIG)
        raise UserError(f"{place}: pruneattn cannot build this AST ({error}); use another model") from error
    place = path.with_name(PREPROCESSOR)
    if place.is_file():
        given = "mean" if mean is not None else "std" if std is not None else None
        if given:
            raise statistics_given(given)
        features = _features(place)
    else:
        features = FeatureConfig(model.frames, *_statistics(place, labels, mean, std), padding="zero")
    if patch_grid(features.frames, own_stride) != patch_grid(model.frames, own_stride):
        raise UserError(f"{place}: max_length is {features.frames}, and in {CONFIG} it is {model.frames}")
    features = replace(features, frames=model.frames)  # the patch embedding skips frames that fill no patch
    model.description = Description(features, labels, config.get("problem_type") == _MULTILABEL)
    return model


def statistics_given(name: str) -> UserError:
    """Error for a mean or deviation that is passed although the checkpoint contains its own."""
    return UserError(
        f"{name} (--{name}) applies only with model (--model), to checkpoints of other projects, and to Hugging Face "
        f"folders without {PREPROCESSOR}"
    )


def _features(place: Path) -> FeatureConfig:
    try:
        return FeatureConfig.from_hugging_face(_read(place))
    except (TypeError, ValueError) as error:
        raise UserError(f"{place}: {error}") from error


def _statistics(place: Path, labels: Sequence[str], mean: float | None, std: float | None) -> tuple[float, float]:
    """Mean and deviation where the file `place` is missing: as given, or AudioSet's if the labels are AudioSet's."""
    if mean is not None and std is not None:
        return mean, std
    if mean is None and std is None and _of_audioset(labels):
        warn_caller(
            f"{place}: no such file; the labels are AudioSet's, so the input is normalized with AudioSet's mean and "
            f"standard deviation ({AUDIOSET_MEAN:g}, {AUDIOSET_STD:g})"
        )
        return AUDIOSET_MEAN, AUDIOSET_STD
    raise UserError(
        f"{place}: no such file, so mean and std of the model's input are unknown; pass both (--mean, --std), or copy "
        "the file from the source of the weights"
    )


def _of_audioset(labels: Sequence[str]) -> bool:
    return len(labels) == 527 and labels[0] == "Speech" and labels[137] == "Music"


def _make(config: Mapping[str, Any], stride: tuple[int, int]) -> tuple[PrunedViT, list[str]]:
    """Create a model from ``config.json``, with this stride; return it with its labels.

    Absent values have the defaults of transformers.
    """
    width, depth = config.get("hidden_size", 768), config.get("num_hidden_layers", 12)
    supported: dict[str, tuple[Any, ...]] = {
        "patch_size": (config.get("patch_size", PATCH), PATCH, [PATCH, PATCH]),
        "num_mel_bins": (config.get("num_mel_bins", MEL_BINS), MEL_BINS),
        "intermediate_size": (config.get("intermediate_size", 3072), MLP_RATIO * width),
        "hidden_act": (config.get("hidden_act", "gelu"), "gelu"),
        "qkv_bias": (config.get("qkv_bias", True), True),
    }
    for name, (value, *usable) in supported.items():
        if value not in usable:
            raise ValueError(f"{name} is {value!r}, not {' or '.join(map(repr, usable))}")
    names = config.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})
    labels = [names[str(number)] for number in range(len(names))]
    pruning = {**config.get("pruneattn", {})}  # a TypeError if it is not a mapping
    model = create_model(
        name_of_size("ast", width, depth) or "ast_base",
        num_classes=len(labels),
        frames=config.get("max_length", 1024),
        stride=stride,
        keep_rate=pruning.get("keep_rate", 1.0),
        prune_blocks=_prune_blocks(pruning, depth),
        score=pruning.get("score"),
        embed_dim=width,
        depth=depth,
        num_heads=config.get("num_attention_heads", 12),
    )
    return model, labels


def _prune_blocks(pruning: Mapping[str, Any], depth: int) -> list[int]:
    """Read the pruning blocks, under either of the names that :func:`~pruneattn.prune` accepts."""
    given = [pruning[name] for name in ("prune_blocks", "blocks") if name in pruning]
    if len(given) == 2 and given[0] != given[1]:
        raise ValueError(f"pruneattn: prune_blocks is {given[0]} and blocks, its other name, is {given[1]}")
    return given[0] if given else [block for block in _PRUNE_BLOCKS if block < depth]


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON or UTF-8
        raise UserError(f"{path}: not readable as JSON ({error}); download it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds a {type(values).__name__}, not a configuration; download it again")
    return values
