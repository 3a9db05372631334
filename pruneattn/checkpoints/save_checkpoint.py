"""Weights in the layouts of other projects: :func:`save_checkpoint`, the inverse of ``load_checkpoint``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..constants import MEL_BINS, PATCH
from ..data.fbank import FeatureConfig
from ..errors import UserError
from ..files import atomic_write
from ..models.vit import PrunedViT, own_model
from .card import make_card
from .converters import AST_HUGGING_FACE, AST_OFFICIAL, AUDIOMAE_FINE_TUNED
from .folder import write_folder
from .hub import CONFIG, PREPROCESSOR
from .huggingface import to_config
from .pretrained import complete_description

#: Keys of each layout.
LAYOUTS = {
    "ast": AST_OFFICIAL,
    "audiomae": AUDIOMAE_FINE_TUNED,
    "huggingface": AST_HUGGING_FACE,
    "timm": AUDIOMAE_FINE_TUNED,
}
_IMAGENET_CLASSES = 1000  # of the two unused heads of the official AST


def save_checkpoint(
    model: nn.Module,
    path: str | Path,
    *,
    format: Literal["ast", "audiomae", "huggingface", "timm"],
    features: FeatureConfig | None = None,
    labels: Sequence[str] | None = None,
    multilabel: bool | None = None,
) -> None:
    """Write the weights of a model in the layout of another project, atomically, bit for bit in the model's dtype.

    - ``"ast"``: a file for strict ``load_state_dict`` of the official AST within ``DataParallel``, made with
      ``ASTModel(fstride=f, tstride=t, input_tdim=frames)``, where ``(f, t)`` is the model's stride. Its two unused
      ImageNet heads (``v.head``, ``v.head_dist``) are zeros, since models of this package do not have them.
    - ``"huggingface"``: a folder for ``transformers.ASTForAudioClassification.from_pretrained`` and ``pipeline``,
      transformers 4 and 5. Its ``config.json`` sets ``frequency_stride`` and ``time_stride`` to the model's stride and
      ``max_length`` to its frames, so the patches are the same. The pipeline of transformers 4 applies softmax to every
      model; for a multilabel model call it with ``function_to_apply="sigmoid"``.
    - ``"audiomae"``: a file for the official AudioMAE's fine-tuned model, ``--finetune FILE --eval``.
    - ``"timm"``: a folder for ``timm.create_model("local-dir:FOLDER", pretrained=True)``, or ``"hf-hub:"`` after an
      upload. The model takes input ``[B, 1, frames, 128]``.

    A model in another project computes every patch until you prune it again. The card in a folder shows how. The
    ``config.json`` of Hugging Face holds the arguments, ``pruneattn.prune(theirs, **theirs.config.pruneattn)``, and
    ``load_pretrained`` uses them.

    Args:
        model: a model of :func:`~pruneattn.create_model`, of the family of the format.
        path: file or folder to write. Existing files of the same kind are replaced.
        format: one of the layouts above.
        features: :class:`~pruneattn.data.fbank.FeatureConfig` of the model's input, required for folders. None:
            ``model.features``.
        labels: name of each class, for folders. None: ``model.labels``, or numbers if there are none.
        multilabel: whether a clip can have several classes, for folders. None: ``model.multilabel``, or left out if
            that is unknown.

    Raises:
        UserError: the format is unknown, belongs to the other family, or needs features; or the files cannot be
            written.
        ValueError: features or labels do not fit the model.
    """
    own = own_model(model, "save_checkpoint")
    state = _state(own, format)
    if format == "ast":
        heads = _imagenet_heads(own)
        return _write_file({f"module.{key}": tensor for key, tensor in (state | heads).items()}, path)
    if format == "audiomae":
        return _write_file({"model": state}, path)

    description = complete_description(own, features, labels, multilabel)
    features = description.features
    if features is None:
        raise UserError(f"format {format!r}: pass features, the FeatureConfig of the model's input")
    if format == "timm":
        configs = {CONFIG: _timm_config(own, features, description.labels)}
        return write_folder(path, state, configs, make_card(own, description, "timm"), own="architecture")
    if features.padding != "zero":
        warnings.warn(
            "Hugging Face's ASTFeatureExtractor pads short clips with 0, but this model pads them with the smallest "
            f"log-mel value: clips of fewer than {features.frames} frames get other scores there",
            stacklevel=2,
        )
    configs = {CONFIG: to_config(own, description), PREPROCESSOR: features.to_hugging_face()}
    return write_folder(path, state, configs, make_card(own, description, "transformers"), own="model_type")


def _state(model: PrunedViT, format: str) -> dict[str, torch.Tensor]:
    """Return the model's tensors by the keys of a layout, on the CPU."""
    if format not in LAYOUTS:
        raise UserError(f"format: {format!r} is not one of {', '.join(LAYOUTS)}")
    family = model.name.partition("_")[0]
    if LAYOUTS[format].family != family:
        fitting = " or ".join(repr(name) for name, keys in LAYOUTS.items() if keys.family == family)
        raise UserError(f"format: {format!r} cannot hold the weights of {model.name}; use {fitting}")
    return LAYOUTS[format].from_ours({name: tensor.detach().cpu() for name, tensor in model.state_dict().items()})


def _imagenet_heads(model: PrunedViT) -> dict[str, torch.Tensor]:
    weight, bias = model.get_parameter("head.weight"), model.get_parameter("head.bias")
    heads = {}
    for name in ("v.head", "v.head_dist"):
        heads[f"{name}.weight"] = weight.new_zeros(_IMAGENET_CLASSES, model.embed_dim, device="cpu")
        heads[f"{name}.bias"] = bias.new_zeros(_IMAGENET_CLASSES, device="cpu")
    return heads


def _timm_config(model: PrunedViT, features: FeatureConfig, labels: Sequence[str] | None) -> dict[str, Any]:
    """Return the ``config.json`` of timm's vision transformer for spectrograms ``[B, 1, frames, 128]``."""
    size = model.name.partition("_")[2]
    return {
        "architecture": f"vit_{size}_patch{PATCH}_224",
        "num_classes": model.num_classes,
        "num_features": model.embed_dim,
        "global_pool": "avg",
        **({} if labels is None else {"label_names": labels}),
        "model_args": {
            "img_size": [model.frames, MEL_BINS],
            "in_chans": 1,
            "global_pool": "avg",
            "embed_dim": model.embed_dim,
            "depth": len(model.blocks),
            "num_heads": model.num_heads,
        },
        "pretrained_cfg": {
            "input_size": [1, model.frames, MEL_BINS],
            "fixed_input_size": True,
            "mean": [features.mean],
            "std": [2 * features.std],  # timm divides by std itself
            "num_classes": model.num_classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _write_file(content: Mapping[str, Any], path: str | Path) -> None:
    with atomic_write(path) as temporary:
        torch.save(content, temporary)
