"""The checkpoint formats people have: how each is told from its keys, and what its keys are called here."""

import re
from dataclasses import dataclass

from ..errors import UserError


@dataclass(frozen=True)
class Format:
    """Keys of one checkpoint format.

    Attributes:
        name: as reports and errors call it.
        family: model it belongs to, ``"audiomae"`` or ``"ast"``.
        marks: keys that are all there in this format.
        renames: (pattern of a whole key, our name for it). Several patterns with the same name are parts of one
            tensor, in this order, as query, key and value are of ``qkv``. Keys that match nothing are not used.
        prefix: what may precede every key, or not.
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
        keys = {key.removeprefix(self.prefix) for key in keys}
        return keys.issuperset(self.marks) and keys.isdisjoint(self.absent)

    def sources(self, keys):
        """Our names, each with the keys that make it up; and the keys without use."""
        found, unused = {}, []
        for key in keys:
            for part, (pattern, name) in enumerate(self.renames):
                match = re.fullmatch(pattern, key.removeprefix(self.prefix))
                if match:
                    found.setdefault(match.expand(name), []).append((part, key))
                    break
            else:
                unused.append(key)
        return {name: [key for _, key in sorted(parts)] for name, parts in found.items()}, unused


_TRUNK = r"(cls_token|pos_embed|patch_embed\.proj\..+|blocks\..+)"
_AUDIOMAE = ((_TRUNK, r"\1"), (r"((?:fc_norm|head)\..+)", r"\1"))
_AST = ((_TRUNK, r"\1"), (r"(dist_token|(?:norm|head_norm|head)\..+)", r"\1"))
_AST_OFFICIAL = (
    (r"v\." + _TRUNK, r"\1"),
    (r"v\.(dist_token|norm\..+)", r"\1"),
    (r"mlp_head\.0\.(.+)", r"head_norm.\1"),
    (r"mlp_head\.1\.(.+)", r"head.\1"),
)


def _hugging_face(layer, query, key, value, output, fc1, fc2):
    """Renames of Hugging Face's AST, whose names inside a layer depend on the version and on memory or disk."""
    return (
        (r"embeddings\.cls_token", "cls_token"),
        (r"embeddings\.distillation_token", "dist_token"),
        (r"embeddings\.position_embeddings", "pos_embed"),
        (r"embeddings\.patch_embeddings\.projection\.(.+)", r"patch_embed.proj.\1"),
        *((rf"{layer}\.(\d+)\.attention\.{part}\.(.+)", r"blocks.\1.attn.qkv.\2") for part in (query, key, value)),
        (rf"{layer}\.(\d+)\.attention\.{output}\.(.+)", r"blocks.\1.attn.proj.\2"),
        (rf"{layer}\.(\d+)\.layernorm_before\.(.+)", r"blocks.\1.norm1.\2"),
        (rf"{layer}\.(\d+)\.layernorm_after\.(.+)", r"blocks.\1.norm2.\2"),
        (rf"{layer}\.(\d+)\.{fc1}\.(.+)", r"blocks.\1.mlp.fc1.\2"),
        (rf"{layer}\.(\d+)\.{fc2}\.(.+)", r"blocks.\1.mlp.fc2.\2"),
        (r"layernorm\.(.+)", r"norm.\1"),
        (r"classifier\.layernorm\.(.+)", r"head_norm.\1"),
        (r"classifier\.dense\.(.+)", r"head.\1"),
    )


_HF_DISK = _hugging_face(
    r"encoder\.layer", r"attention\.query", r"attention\.key", r"attention\.value", r"output\.dense",
    r"intermediate\.dense", r"output\.dense",
)  # fmt: skip
_HF_MEMORY = _hugging_face("layers", "q_proj", "k_proj", "v_proj", "o_proj", r"mlp\.fc1", r"mlp\.fc2")
_HF_PREFIX = "audio_spectrogram_transformer."
QKV = "blocks.0.attn.qkv.weight"

FORMATS = (
    Format("AST, official", "ast", ("v.pos_embed", "v.dist_token", "v." + QKV), _AST_OFFICIAL, strided=True),
    Format(
        "AST, Hugging Face",
        "ast",
        ("embeddings.position_embeddings", "encoder.layer.0.attention.attention.query.weight"),
        _HF_DISK,
        prefix=_HF_PREFIX,
        strided=True,
    ),
    Format(
        "AST, Hugging Face (module names of transformers 5)",
        "ast",
        ("embeddings.position_embeddings", "layers.0.attention.q_proj.weight"),
        _HF_MEMORY,
        prefix=_HF_PREFIX,
        strided=True,
    ),
    Format("AST, pruneattn", "ast", ("pos_embed", "dist_token", "head_norm.weight", QKV), _AST),
    Format("AudioMAE, pre-trained", "audiomae", ("pos_embed", "mask_token", QKV), _AUDIOMAE, absent=("dist_token",)),
    Format(
        "AudioMAE, fine-tuned (official, timm or pruneattn)",
        "audiomae",
        ("cls_token", "pos_embed", QKV),
        _AUDIOMAE,
        absent=("dist_token",),
    ),
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
