"""The checkpoint formats people have: how each is told from its keys, and what its keys are called here.

One table for each format, read in both directions: :mod:`~pruneattn.checkpoints.load_checkpoint` takes other people's keys to
ours, :mod:`~pruneattn.checkpoints.save_checkpoint` ours to theirs.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from ..errors import UserError


@dataclass(frozen=True)
class Format:
    """Keys of one checkpoint format.

    Attributes:
        name: as reports and errors call it.
        family: model it belongs to, ``"audiomae"`` or ``"ast"``.
        marks: keys that are all there in this format.
        renames: (their key, ours), where ``#`` stands for a number and ``*`` for any text, the same on both sides.
            Several of their keys with the same name of ours are parts of one tensor, in this order, as query, key and
            value are of ``qkv``. Keys that match nothing are not used.
        prefix: what keys may lack at the front, as those of a trunk that was saved without its head.
        absent: keys that are never there.
        strided: whether models with a patch stride of 10 come in this format.
    """

    name: str
    family: str
    marks: tuple[str, ...]
    renames: tuple[tuple[str, str], ...]
    prefix: str = ""
    absent: tuple[str, ...] = ()
    strided: bool = False

    def fits(self, keys):
        keys = {*keys, *(self.prefix + key for key in keys)}
        return keys.issuperset(self.marks) and keys.isdisjoint(self.absent)

    def sources(self, keys):
        """Our names, each with the keys that make it up; and the keys without use."""
        found, unused = {}, []
        for key in keys:
            for part, (theirs, ours) in enumerate(self.renames):
                name = _renamed(key, theirs, ours) or _renamed(self.prefix + key, theirs, ours)
                if name:
                    found.setdefault(name, []).append((part, key))
                    break
            else:
                unused.append(key)
        return {name: [key for _, key in sorted(parts)] for name, parts in found.items()}, unused

    def targets(self, name):
        """The keys that make up our tensor `name` in this format, in order: the inverse of ``sources``."""
        return [key for theirs, ours in self.renames if (key := _renamed(name, ours, theirs))]


def _renamed(name, pattern, other):
    """`name` with the texts that fill the places of `pattern` put into those of `other`; None if it does not fit."""
    match = _compiled(pattern).fullmatch(name)
    if match is None:
        return None
    texts = iter(match.groups())
    return re.sub(r"[#*]", lambda _: next(texts), other)


@lru_cache(maxsize=None)
def _compiled(pattern):
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


def _hugging_face(layer, query, key, value, output, fc1, fc2):
    """Renames of Hugging Face's AST, whose names inside a layer depend on the version and on memory or disk."""
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

AST_OFFICIAL = Format("AST, official", "ast", ("v.pos_embed", "v.dist_token", "v." + QKV), _AST_OFFICIAL, strided=True)
AST_HUGGING_FACE = Format(
    "AST, Hugging Face",
    "ast",
    (f"{_HF}embeddings.position_embeddings", f"{_HF}encoder.layer.0.attention.attention.query.weight"),
    _HF_DISK,
    prefix=_HF,
    strided=True,
)
AUDIOMAE_FINE_TUNED = Format(
    "AudioMAE, fine-tuned (official, timm or pruneattn)",
    "audiomae",
    ("cls_token", "pos_embed", QKV),
    _AUDIOMAE,
    absent=("dist_token",),
)
FORMATS = (
    AST_OFFICIAL,
    AST_HUGGING_FACE,
    Format(
        "AST, Hugging Face (module names of transformers 5)",
        "ast",
        (f"{_HF}embeddings.position_embeddings", f"{_HF}layers.0.attention.q_proj.weight"),
        _HF_MEMORY,
        prefix=_HF,
        strided=True,
    ),
    Format("AST, pruneattn", "ast", ("pos_embed", "dist_token", "head_norm.weight", QKV), _AST),
    Format("AudioMAE, pre-trained", "audiomae", ("pos_embed", "mask_token", QKV), _AUDIOMAE, absent=("dist_token",)),
    AUDIOMAE_FINE_TUNED,
)


def detect_format(state, path):
    """The :class:`Format` of a state dict; `path` is for the message of the UserError raised if none fits."""
    for key, value in state.items():
        # A colour image model has the very names of AudioMAE's trunk; say what is wrong before anything else does.
        if key.endswith(("patch_embed.proj.weight", "projection.weight")) and value.dim() == 4 and value.shape[1] != 1:
            raise UserError(
                f"{path}: {key} is {list(value.shape)}: patches of {value.shape[1]} channels, as of an image model, "
                "where a spectrogram has 1; give a checkpoint trained on audio"
            )
    for format_ in FORMATS:
        if format_.fits(state):
            return format_
    looked_for = "; ".join(f"{format_.name} ({', '.join(format_.marks)})" for format_ in FORMATS)
    raise UserError(
        f"{path}: no known checkpoint format. Looked for {looked_for}. The file has {len(state)} tensors: "
        f"{', '.join(list(state)[:6])}{', ...' if len(state) > 6 else ''}. Rename its keys to one of these formats"
    )
