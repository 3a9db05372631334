"""The facts about a model, in addition to its blocks, that pruning needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from ..models.blocks import PRUNE_BLOCKS
from .block import BlockView


@dataclass
class Trunk:
    """The part of a model that contains its blocks.

    Attributes:
        blocks: the blocks, in the order in which they run.
        path: name of the blocks in the model, for messages.
        view: the class derived from :class:`~pruneattn.adapters.BlockView` for these blocks.
        extra_tokens: number of tokens at the front that are not patches.
        class_token: whether the first extra token is a class token.
        guard: function that rejects the calls that a pruned model does not support.
        unguard: function that undoes ``guard`` and ``guard_optimized``.
        prune_blocks: blocks that prune by default, from 0.
        guard_optimized: function that rejects the calls that an optimized model does not support. Masks that the blocks
            receive as arguments are supported.
        module: the part of the model that runs the blocks; None for the module in which the family found them.
    """

    blocks: Sequence[nn.Module] | nn.ModuleList | nn.Sequential
    path: str
    view: type[BlockView]
    extra_tokens: int
    class_token: bool
    guard: Callable[[], None] = lambda: None
    unguard: Callable[[], None] = lambda: None
    prune_blocks: Sequence[int] = PRUNE_BLOCKS
    guard_optimized: Callable[[], None] = lambda: None
    module: nn.Module | None = None
