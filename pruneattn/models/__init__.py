"""Pruned audio transformers by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..constants import PATCH
from ..errors import UserError
from .ast import AST
from .audiomae import AudioMAE
from .blocks import PRUNE_BLOCKS
from .patches import Stride
from .scores import Score
from .vit import PrunedViT

__all__ = ["AST", "AudioMAE", "PrunedViT", "create_model", "list_models"]

_FAMILIES: dict[str, tuple[type[PrunedViT], tuple[str, ...]]] = {
    "audiomae": (AudioMAE, ("tiny", "small", "base", "large")),
    "ast": (AST, ("tiny", "small", "base")),
}
_SIZES = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}


def list_models() -> list[str]:
    """Names that :func:`create_model` accepts."""
    return [f"{family}_{size}" for family, (_, sizes) in _FAMILIES.items() for size in sizes]


def name_of_size(family: str, embed_dim: int, depth: int) -> str | None:
    """Name of the model of this family, width and depth; None if no named model has them."""
    for size in _FAMILIES[family][1]:
        if (_SIZES[size]["embed_dim"], _SIZES[size]["depth"]) == (embed_dim, depth):
            return f"{family}_{size}"
    return None


def create_model(
    name: str,
    *,
    num_classes: int = 527,
    frames: int = 1024,
    stride: Stride = PATCH,
    keep_rate: float | Sequence[float] = 1.0,
    prune_blocks: Iterable[int] = PRUNE_BLOCKS,
    score: Score | None = None,
    drop_path: float = 0.0,
    embed_dim: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
) -> PrunedViT:
    """Create an AudioMAE or AST with token pruning and random weights.

    Args:
        name: one of :func:`list_models`, for example ``"audiomae_base"``.
        num_classes: number of classes of the head.
        frames: frames of the spectrogram, at least 16 (128, 512 and 1024 in the paper). Frames after the last whole
            patch are not used.
        stride: mel bins and frames from one patch to the next, 1 to 16: one number, or ``(frequency, time)``. Patches
            are 16 x 16, so there are ``(size - 16) // stride + 1`` along an axis. 16 is the paper's stride; 10 is that
            of the published AST, with 12 x 101 patches for 1024 frames. AudioMAE supports 16 only.
        keep_rate: fraction of the patches that each pruning block keeps, in (0, 1]: one number, or one per pruning
            block. ``model.set_keep_rate`` changes it at any time.
        prune_blocks: numbers of the blocks that drop patches after their attention, from 0, ascending.
        score: ranks the patches: ``"column_mean"``, ``"cls"``, ``"intensity"``, ``"variation"``, ``"random"``; or a
            function ``score(q, k, v, extra_tokens)`` of ``[B, H, N, D]`` each that returns ``[B, N - extra_tokens]``,
            where the highest scores are kept; or a :class:`~pruneattn.Pruning`. None: the paper's score for the model.
        drop_path: rate of stochastic depth in the last block; it grows linearly from 0 in the first block.
        embed_dim, depth, num_heads: override the named size.

    Returns:
        The model, a :class:`~pruneattn.models.PrunedViT`.

    Raises:
        UserError: an argument is invalid; the message names it.
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
        stride=stride,
        keep_rate=keep_rate,
        prune_blocks=prune_blocks,
        score=score,
        drop_path=drop_path,
        **sizes,
    )
