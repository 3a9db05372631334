"""Weights of ours in the layouts of other projects: :func:`save_checkpoint`, the inverse of ``load_checkpoint``."""

import warnings

import torch

from ..constants import MEL_BINS, PATCH
from ..errors import UserError
from ..files import atomic_write
from ..models.vit import own_model
from .card import make_card
from .converters import AST_HUGGING_FACE, AST_OFFICIAL, AUDIOMAE_FINE_TUNED
from .folder import write_folder
from .hub import CONFIG, PREPROCESSOR
from .huggingface import to_config
from .pretrained import check_description

#: Keys of each layout.
LAYOUTS = {
    "ast": AST_OFFICIAL,
    "audiomae": AUDIOMAE_FINE_TUNED,
    "huggingface": AST_HUGGING_FACE,
    "timm": AUDIOMAE_FINE_TUNED,
}
_IMAGENET_CLASSES = 1000  # of the two heads that the official AST's model has and never uses


def save_checkpoint(model, path, *, format, features=None, labels=None, multilabel=None):
    """Write a model's weights as another project has them, atomically, in the model's dtype and bit for bit.

    - ``"ast"``: a file for the official AST's ``load_state_dict``, strict and within ``DataParallel``, of
      ``ASTModel(fstride=16, tstride=16, input_tdim=frames)``. The two ImageNet heads that its model has and never uses
      (``v.head``, ``v.head_dist``) are zeros: no model here has them.
    - ``"huggingface"``: a folder for ``transformers.ASTForAudioClassification.from_pretrained`` and ``pipeline``,
      transformers 4 and 5. Patches are the same with ``frequency_stride`` and ``time_stride`` 16 and ``max_length`` the
      model's frames, which is what its ``config.json`` says. The pipeline of transformers 4 takes every model for one
      of softmax: for a multilabel one call it with ``function_to_apply="sigmoid"``.
    - ``"audiomae"``: a file for the official AudioMAE's fine-tuned model, ``--finetune FILE --eval``.
    - ``"timm"``: a folder for ``timm.create_model("local-dir:FOLDER", pretrained=True)``, or ``"hf-hub:"`` once it is
      uploaded; input ``[B, 1, frames, 128]``.

    Such a model computes every patch until it is pruned anew. The card of a folder says how; ``config.json`` of
    Hugging Face holds the arguments: ``pruneattn.prune(theirs, **theirs.config.pruneattn)``, as ``load_pretrained`` does.

    Args:
        model: from :func:`~pruneattn.create_model`, of the family that the format is for.
        path: file or folder to write; what is there of the same kind is replaced.
        format: see above.
        features: :class:`~pruneattn.data.fbank.FeatureConfig` of the model's input, which folders need. None: that of
            the model, as :func:`~pruneattn.load_pretrained` gives it.
        labels: names of the classes, for folders. None: the model's, or numbers.
        multilabel: whether several classes can hold at once, for folders. None: the model's, or not said.

    Raises:
        UserError: the format is unknown, of the other family, or needs features; or the files cannot be written.
        ValueError: features or labels do not fit the model.
    """
    model = own_model(model, "save_checkpoint")
    state = _renamed(model, format)
    if format == "ast":
        return _write_file({f"module.{key}": tensor for key, tensor in (state | _imagenet_heads(model)).items()}, path)
    if format == "audiomae":
        return _write_file({"model": state}, path)

    features = model.description.features if features is None else features
    labels = model.description.labels if labels is None else list(labels)
    multilabel = model.description.multilabel if multilabel is None else multilabel
    if features is None:
        raise UserError(f"format {format!r}: give features, the FeatureConfig that says what input the model takes")
    check_description(model, features, labels)
    if format == "timm":
        configs = {CONFIG: _timm_config(model, features, labels)}
        card = make_card(model, features, labels, multilabel, library="timm")
        return write_folder(path, state, configs, card, own="architecture")
    if features.padding != "zero":
        warnings.warn(
            "Hugging Face's ASTFeatureExtractor pads short clips with 0, and this model's input with the log-mel's "
            f"floor: clips of fewer than {features.frames} frames will get other scores there",
            stacklevel=2,
        )
    configs = {CONFIG: to_config(model, labels, multilabel), PREPROCESSOR: features.to_hugging_face()}
    card = make_card(model, features, labels, multilabel, library="transformers")
    return write_folder(path, state, configs, card, own="model_type")


def _renamed(model, format):
    """The model's tensors by the layout's keys, on the CPU."""
    if format not in LAYOUTS:
        raise UserError(f"format: {format!r} is not one of {', '.join(LAYOUTS)}")
    family = model.name.partition("_")[0]
    if LAYOUTS[format].family != family:
        fitting = " or ".join(repr(name) for name, keys in LAYOUTS.items() if keys.family == family)
        raise UserError(f"format: {format!r} has no place for the weights of {model.name}; use {fitting}")
    state = {}
    for name, tensor in model.state_dict().items():
        keys = LAYOUTS[format].targets(name)
        parts = tensor.detach().cpu().chunk(len(keys))  # query, key and value of qkv
        state.update({key: part.contiguous() for key, part in zip(keys, parts, strict=True)})
    return state


def _imagenet_heads(model):
    heads = {}
    for name in ("v.head", "v.head_dist"):
        heads[f"{name}.weight"] = model.head.weight.new_zeros(_IMAGENET_CLASSES, model.embed_dim, device="cpu")
        heads[f"{name}.bias"] = model.head.bias.new_zeros(_IMAGENET_CLASSES, device="cpu")
    return heads


def _timm_config(model, features, labels):
    """``config.json`` from which timm makes a vision transformer for spectrograms ``[B, 1, frames, 128]``."""
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


def _write_file(content, path):
    with atomic_write(path) as temporary:
        torch.save(content, temporary)
