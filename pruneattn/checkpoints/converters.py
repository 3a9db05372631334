"""Checkpoint formats: the keys by which each format is recognized, and their mapping to the keys of the model.

Each format is one table that works in both directions. :mod:`~pruneattn.checkpoints.load_checkpoint` maps the keys of
other projects to those of the model, :mod:`~pruneattn.checkpoints.save_checkpoint` maps them back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from ..errors import UserError


@dataclass(frozen=True)
class Format:
    """Keys of one checkpoint format.

    Attributes:
        name: name in reports and error messages.
        family: model family, ``"audiomae"`` or ``"ast"``.
        marks: keys that every checkpoint of this format has.
        renames: pairs (their key, our key). ``#`` stands for a number and ``*`` for any text, equal on both sides. If
            several of their keys map to one of our keys, they are parts of one tensor, in this order; for example
            query, key and value are the parts of ``qkv``. Keys that match no pair are not used.
        prefix: text that all keys may lack at the front, as in a trunk that was saved without its head.
        absent: keys that no checkpoint of this format has.
    """

    name: str
    family: str
    marks: tuple[str, ...]
    renames: tuple[tuple[str, str], ...]
    prefix: str = ""
    absent: tuple[str, ...] = ()

    def fits(self, keys: Iterable[str]) -> bool:
        """Whether a checkpoint with these keys has this format."""
        keys = {*keys}
        keys |= {self.prefix + key for key in keys}
        return keys.issuperset(self.marks) and keys.isdisjoint(self.absent)

    def sources(self, keys: Iterable[str]) -> tuple[dict[str, list[str]], list[str]]:
        """Map our names to the keys of their parts, and list the unused keys."""
        found: dict[str, list[tuple[int, str]]] = {}
        unused = []
        for key in keys:
            for part, (theirs, ours) in enumerate(self.renames):
                name = _renamed(key, theirs, ours) or _renamed(self.prefix + key, theirs, ours)
                if name:
                    found.setdefault(name, []).append((part, key))
                    break
            else:
                unused.append(key)
        return {name: [key for _, key in sorted(parts)] for name, parts in found.items()}, unused

    def targets(self, name: str) -> list[str]:
        """Return the keys of the parts of our tensor `name` in order; the inverse of ``sources``."""
        return [key for theirs, ours in self.renames if (key := _renamed(name, ours, theirs))]

    def from_ours(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rename the state dict of a model of this family to the keys of this format.

        Args:
            state: ``model.state_dict()`` of a model of :func:`~pruneattn.create_model`.

        Returns:
            Tensors by their keys. A tensor with several parts is split into contiguous copies along the first
            dimension. Tensors that are contiguous and have one part share memory with `state`.
        """
        renamed = {}
        for name, tensor in state.items():
            keys = self.targets(name)
            parts = tensor.chunk(len(keys))
            renamed.update({key: part.contiguous() for key, part in zip(keys, parts, strict=True)})
        return renamed


def _renamed(name: str, pattern: str, other: str) -> str | None:
    """Match `name` with `pattern` and put the matched texts into the places of `other`; None if it does not match."""
    match = _compiled(pattern).fullmatch(name)
    if match is None:
        return None
    texts = iter(match.groups())
    return re.sub(r"[#*]", lambda _: next(texts), other)


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\#", r"(\d+)").replace(r"\*", "(.+)"))


_TRUNK = ("cls_token", "pos_embed", "patch_embed.proj.*", "blocks.*")
_AUDIOMAE = tuple((name, name) for name in (*_TRUNK, "fc_norm.*", "head.*"))
_AST = tuple((name, name) for name in (*_TRUNK, "dist_token", "norm.*", "head_norm.*", "head.*"))
_AST_OFFICIAL = (
    *((f"v.{name}", name) for name in (*_TRUNK, "dist_token", "norm.*")),
    ("mlp_head.0.*", "head_norm.*"),
    ("mlp_head.1.*", "head.*"),
)
_HF = "audio_spectrogram_transformer."


def _hugging_face(
    layer: str, query: str, key: str, value: str, output: str, fc1: str, fc2: str
) -> tuple[tuple[str, str], ...]:
    """Renames of Hugging Face's AST. transformers 5 has other names inside a layer in memory than on disk."""
    layer = f"{_HF}{layer}.#"
    return (
        (f"{_HF}embeddings.cls_token", "cls_token"),
        (f"{_HF}embeddings.distillation_token", "dist_token"),
        (f"{_HF}embeddings.position_embeddings", "pos_embed"),
        (f"{_HF}embeddings.patch_embeddings.projection.*", "patch_embed.proj.*"),
        *((f"{layer}.attention.{part}.*", "blocks.#.attn.qkv.*") for part in (query, key, value)),
        (f"{layer}.attention.{output}.*", "blocks.#.attn.proj.*"),
        (f"{layer}.layernorm_before.*", "blocks.#.norm1.*"),
        (f"{layer}.layernorm_after.*", "blocks.#.norm2.*"),
        (f"{layer}.{fc1}.*", "blocks.#.mlp.fc1.*"),
        (f"{layer}.{fc2}.*", "blocks.#.mlp.fc2.*"),
        (f"{_HF}layernorm.*", "norm.*"),
        ("classifier.layernorm.*", "head_norm.*"),
        ("classifier.dense.*", "head.*"),
    )


_HF_DISK = _hugging_face(
    "encoder.layer",
    "attention.query",
    "attention.key",
    "attention.value",
    "output.dense",
    "intermediate.dense",
    "output.dense",
)
_HF_MEMORY = _hugging_face("layers", "q_proj", "k_proj", "v_proj", "o_proj", "mlp.fc1", "mlp.fc2")
QKV = "blocks.0.attn.qkv.weight"

AST_OFFICIAL = Format("AST, official", "ast", ("v.pos_embed", "v.dist_token", "v." + QKV), _AST_OFFICIAL)
AST_HUGGING_FACE = Format(
    "AST, Hugging Face",
    "ast",
    (f"{_HF}embeddings.position_embeddings", f"{_HF}encoder.layer.0.attention.attention.query.weight"),
    _HF_DISK,
    prefix=_HF,
)
AUDIOMAE_FINE_TUNED = Format(
    "AudioMAE, fine-tuned (official, timm or pruneattn)",
    "audiomae",
    ("cls_token", "pos_embed", QKV),
    _AUDIOMAE,
    absent=("dist_token",),
)
#: Names of the modules, and so the keys of ``state_dict()``, in transformers 5. Its files use ``AST_HUGGING_FACE``.
AST_HUGGING_FACE_MODULES = Format(
    "AST, Hugging Face (module names of transformers 5)",
    "ast",
    (f"{_HF}embeddings.position_embeddings", f"{_HF}layers.0.attention.q_proj.weight"),
    _HF_MEMORY,
    prefix=_HF,
)
FORMATS = (
    AST_OFFICIAL,
    AST_HUGGING_FACE,
    AST_HUGGING_FACE_MODULES,
    Format("AST, pruneattn", "ast", ("pos_embed", "dist_token", "head_norm.weight", QKV), _AST),
    Format("AudioMAE, pretrained", "audiomae", ("pos_embed", "mask_token", QKV), _AUDIOMAE, absent=("dist_token",)),
    AUDIOMAE_FINE_TUNED,
)


def detect_format(state: Mapping[str, torch.Tensor], path: str | Path) -> Format:
    """Find the :class:`Format` of a state dict.

    Args:
        state: tensors by key.
        path: the file, for error messages.

    Raises:
        UserError: no format fits, or the patches have more than one channel.
    """
    for key, value in state.items():
        # The trunk of an RGB image model has the same keys as AudioMAE's, so check the channels first.
        if key.endswith(("patch_embed.proj.weight", "projection.weight")) and value.dim() == 4 and value.shape[1] != 1:
            raise UserError(
                f"{path}: {key} is {list(value.shape)}: patches of {value.shape[1]} channels, as in an image model, "
                "but a spectrogram has 1; use a checkpoint that was trained on audio"
            )
    for format_ in FORMATS:
        if format_.fits(state):
            return format_
    looked_for = "; ".join(f"{format_.name} ({', '.join(format_.marks)})" for format_ in FORMATS)
    raise UserError(
        f"{path}: no known checkpoint format. Looked for {looked_for}. The file has {len(state)} tensors: "
        f"{', '.join(list(state)[:6])}{', ...' if len(state) > 6 else ''}. Rename its keys to one of these formats"
    )
