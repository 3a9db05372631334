"""What pruning must know of a model beside its blocks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn


@dataclass
class Trunk:
    """The part of a model that has its blocks.

    Attributes:
        blocks: in the order in which they run.
        path: their name in the model, for messages.
        view: the class derived from :class:`~pruneattn.adapters.BlockView` that knows them.
        extra_tokens: how many tokens at the front are not patches.
        class_token: whether the first of these is a class token.
        guard, unguard: functions that refuse, and allow again, what the model cannot do while it is pruned.
    """

    blocks: Sequence[nn.Module]
    path: str
    view: type
    extra_tokens: int
    class_token: bool
    guard: Callable = lambda: None
    unguard: Callable = lambda: None
