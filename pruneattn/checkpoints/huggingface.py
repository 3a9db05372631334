"""Hugging Face's AST as a folder or Hub repository describes it, in ``config.json`` beside the weights."""

import json
from dataclasses import replace

from ..constants import MEL_BINS, PATCH
from ..errors import UserError
from ..models import create_model, name_of_size
from ..models.blocks import MLP_RATIO
from ..models.scores import ADAPTED_SCORES
from .hub import CONFIG, PREPROCESSOR

MODEL_TYPE = "audio-spectrogram-transformer"
_MULTILABEL, _SINGLE = "multi_label_classification", "single_label_classification"


def to_config(model, labels, multilabel):
    """``config.json`` of a model of ours, as a dict. Its ``pruneattn`` holds the arguments of ``pruneattn.prune``: a
    model of Hugging Face's keeps it as ``model.config.pruneattn``, and does not act on it.

    ``layer_norm_eps`` is one number there: 1e-6, right for all norms but the head's, whose 1e-5 is a difference of
    about 5e-6 of its output.

    Args:
        labels: names of the classes, or None for numbered ones.
        multilabel: see :func:`~pruneattn.save_pretrained`; None says nothing, which Hugging Face takes for False.
    """
    labels = [f"LABEL_{number}" for number in range(model.num_classes)] if labels is None else labels
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
        "frequency_stride": PATCH,
        "time_stride": PATCH,
        "max_length": model.frames,
        "num_mel_bins": MEL_BINS,
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
        "torch_dtype": str(model.head.weight.dtype).removeprefix("torch."),
    }
    if model.prune_blocks and model.score in ADAPTED_SCORES:
        blocks, rates = list(model.prune_blocks), list(model.keep_rates)
        config["pruneattn"] = {"keep_rate": rates, "blocks": blocks, "score": model.score}
    if multilabel is not None:
        config["problem_type"] = _MULTILABEL if multilabel else _SINGLE
    return config


def load_from_config(path):
    """Make the model whose weights are `path`, from the files beside it; pruned as ``pruneattn`` in ``config.json`` says.

    Args:
        path: weights of an ``ASTForAudioClassification``.

    Returns:
        The model with its attributes as of :func:`~pruneattn.load_pretrained`, or None where no ``config.json`` of
        such a model lies beside the weights. ``model.multilabel`` is what ``problem_type`` says, and False without.

    Raises:
        UserError: the model is not one that AST here can be, or weights and configuration do not go together.
    """
    from ..data.fbank import FeatureConfig
    from .load_checkpoint import load_complete

    place = path.with_name(CONFIG)
    config = _read(place) if place.is_file() else {}
    if config.get("model_type") != MODEL_TYPE:
        return None
    try:
        model, labels, stride = _make(config)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{place}: an AST that cannot be made here ({error}); use another model") from error
    place = path.with_name(PREPROCESSOR)
    if not place.is_file():
        raise UserError(
            f"{place}: no such file, so mean and std of the model's input are unknown; take it from where the weights "
            "are from (or give them: create_model, load_checkpoint; on the command line --model, --mean, --std)"
        )
    try:
        features = FeatureConfig.from_hugging_face(_read(place))
    except (TypeError, ValueError) as error:
        raise UserError(f"{place}: {error}") from error
    if features.frames // PATCH * PATCH != model.frames:
        raise UserError(f"{place}: max_length is {features.frames}, and in {CONFIG} it is {config.get('max_length')}")
    load_complete(model, path, stride)
    model.features = replace(features, frames=model.frames)  # the convolution leaves out what fills no patch
    model.labels, model.multilabel, model.extra = labels, config.get("problem_type") == _MULTILABEL, {}
    return model.eval()


def _make(config):
    """A fresh model for ``config.json``, its labels, and the stride of the patches; what is absent has Hugging Face's
    default.
    """
    width, depth = config.get("hidden_size", 768), config.get("num_hidden_layers", 12)
    strides = (config.get("frequency_stride", 10), config.get("time_stride", 10))
    only = {
        "patch_size": (config.get("patch_size", PATCH), PATCH, [PATCH, PATCH]),
        "num_mel_bins": (config.get("num_mel_bins", MEL_BINS), MEL_BINS),
        "intermediate_size": (config.get("intermediate_size", 3072), MLP_RATIO * width),
        "hidden_act": (config.get("hidden_act", "gelu"), "gelu"),
        "qkv_bias": (config.get("qkv_bias", True), True),
        "frequency_stride, time_stride": (strides, (PATCH, PATCH), (10, 10)),  # 10 is resampled by fit_positions
    }
    for name, (value, *usable) in only.items():
        if value not in usable:
            raise ValueError(f"{name} is {value!r}, not {' or '.join(map(repr, usable))}")
    names = config.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})
    labels = [names[str(number)] for number in range(len(names))]
    pruning = {
        "blocks": [block for block in (3, 6, 9) if block < depth],
        "keep_rate": 1.0,
        **config.get("pruneattn", {}),
    }
    model = create_model(
        name_of_size("ast", width, depth) or "ast_base",
        num_classes=len(labels),
        frames=config.get("max_length", 1024) // PATCH * PATCH,
        keep_rate=pruning["keep_rate"],
        prune_blocks=pruning["blocks"],
        score=pruning.get("score"),
        embed_dim=width,
        depth=depth,
        num_heads=config.get("num_attention_heads", 12),
    )
    return model, labels, strides[0]


def _read(path):
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON or UTF-8
        raise UserError(f"{path}: not readable as JSON ({error}); download it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds a {type(values).__name__}, not a configuration; download it again")
    return values
