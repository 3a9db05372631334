"""Pruned audio transformers by name."""

from ..errors import UserError
from .ast import AST
from .audiomae import AudioMAE
from .vit import PrunedViT

__all__ = ["AST", "AudioMAE", "PrunedViT", "create_model", "list_models"]

_FAMILIES = {"audiomae": (AudioMAE, ("tiny", "small", "base", "large")), "ast": (AST, ("tiny", "small", "base"))}
_SIZES = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}


def list_models():
    """Names that :func:`create_model` knows."""
    return [f"{family}_{size}" for family, (_, sizes) in _FAMILIES.items() for size in sizes]


def name_of_size(family, embed_dim, depth):
    """Name of the model of that family, width and depth; None if none has a name."""
    for size in _FAMILIES[family][1]:
        if (_SIZES[size]["embed_dim"], _SIZES[size]["depth"]) == (embed_dim, depth):
            return f"{family}_{size}"
    return None


def create_model(
    name,
    *,
    num_classes=527,
    frames=1024,
    keep_rate=1.0,
    prune_blocks=(3, 6, 9),
    score=None,
    drop_path=0.0,
    embed_dim=None,
    depth=None,
    num_heads=None,
):
    """Make an AudioMAE or AST with token pruning and fresh weights.

    Args:
        name: one of :func:`list_models`, such as ``"audiomae_base"``.
        num_classes: classes of the head.
        frames: frames of the spectrogram, a multiple of 16 (128, 512 and 1024 in the paper).
        keep_rate: share of the patches that each pruning block keeps, in (0, 1]: one number or one per pruning block.
            ``model.set_keep_rate`` changes it at any time.
        prune_blocks: blocks, counted from 0, that drop patches after their attention.
        score: ``"column_mean"``, ``"cls"``, ``"intensity"``, ``"variation"``, ``"random"``, a function
            ``score(q, k, v, extra_tokens)`` of ``[B, H, N, D]`` each that returns ``[B, N - extra_tokens]``, the
            higher the more worth keeping, or a :class:`~pruneattn.Pruning`. None: the paper's for that model.
        drop_path: stochastic depth of the last block, growing linearly from 0 in the first.
        embed_dim, depth, num_heads: override the named size.

    Raises:
        UserError: an argument cannot be used; the message names it.
    """
    if name not in list_models():
        raise UserError(f"model: {name!r} is not one of {', '.join(list_models())}")
    family, _, size = name.partition("_")
    overrides = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
    sizes = _SIZES[size] | {key: value for key, value in overrides.items() if value is not None}
    return _FAMILIES[family][0](
        name,
        num_classes=num_classes,
        frames=frames,
        keep_rate=keep_rate,
        prune_blocks=prune_blocks,
        score=score,
        drop_path=drop_path,
        **sizes,
    )
