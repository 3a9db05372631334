"""A block of another library's model that drops patches between its attention and its MLP."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..errors import UserError
from ..models.blocks import attention, kept_patches
from ..models.heads import MultiHead
from ..models.scores import ColumnMeanPruning, FunctionPruning, Pruning


class BlockView(MultiHead):
    """Base class of a family's view of its blocks: it gives the parts of a block the names that the prunings use.

    A derived class runs the parts of ``self.block``. This is a transformer block that takes tokens ``[B, N, C]``,
    returns tokens (alone or first in a tuple), and acts row by row except in attention. Before a block is changed, a
    copy of it with random weights is compared with the result of the view, so that a wrong view is rejected.

    Attributes:
        block: the block.
        arguments: names of the supported arguments of the block's forward, in addition to the tokens. They are passed
            through while every patch is kept. A pruned block rejects every argument that is neither None nor False.
    """

    arguments: tuple[str, ...] = ()

    def __init__(self, block: nn.Module) -> None:
        self.block: Any = block  # its parts are attributes that nn.Module does not declare

    @classmethod
    def check(cls, block: Any, path: str) -> None:
        """Check that the block has exactly the parts of the family.

        ``checks.py`` has ``expect_parts``, ``expect_linear`` and ``expect_heads`` for this.

        Args:
            block: the block.
            path: its name in the model, for messages.

        Raises:
            UserError: a part is missing or unknown.
        """
        raise NotImplementedError

    @property
    def dim(self) -> int:
        """Channels of a token, C."""
        raise NotImplementedError

    # The base class declares attributes, which its other subclass sets; a view computes them from the block.

    @property
    def num_heads(self) -> int:  # type: ignore[override]  # see above
        """Heads of the attention, H."""
        raise NotImplementedError

    @property
    def head_dim(self) -> int:  # type: ignore[override]  # see above
        """Channels of a head, D; H * D can differ from C."""
        return self.dim // self.num_heads

    @property
    def dropout(self) -> float:
        """Current rate of dropout on the softmax matrix; 0 outside training."""
        return 0.0

    def norm(self, x: Tensor) -> Tensor:
        """The tokens ``[B, N, C]`` that attention reads; ``x`` itself if the norm follows attention."""
        raise NotImplementedError

    def project(self, x: Tensor, parts: str) -> list[Tensor]:
        """Project the rows ``x`` ``[B, M, C]`` only.

        ``self.split_heads(packed)`` splits ``[B, M, parts * H * D]`` into the results.

        Args:
            x: tokens after ``norm``.
            parts: neighboring letters of "qkv".

        Returns:
            A view ``[B, H, M, D]`` for each letter of ``parts``.
        """
        raise NotImplementedError

    def finish(self, x: Tensor, attended: Tensor) -> Any:
        """Run the steps of the block after attention, for some rows.

        Args:
            x: the block's input ``[B, M, C]``.
            attended: attention output before the projection, ``[B, M, H * D]``.

        Returns:
            The block's return value for these rows.
        """
        raise NotImplementedError

    def kernel(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention output ``[B, H, N, D]``, with dropout in training."""
        dropout = self.dropout
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout) if dropout else attention(q, k, v)


@dataclass
class BlockPruning:
    """Settings of a pruning block, held next to the block's own attributes.

    Attributes:
        path: name of the block in its model, for messages.
        view: class of the view.
        extra_tokens: number of tokens at the front that are not patches.
        pruning: ranks the patches.
        keep_rate: in (0, 1].
    """

    path: str
    view: type[BlockView]
    extra_tokens: int
    pruning: Pruning
    keep_rate: float


class PrunedBlock(nn.Module):
    """Class that :func:`start_pruning` puts before a block's own class.

    The block remains the same object, with the same parameters, hooks and ``isinstance`` results. Its class keeps its
    name, by which libraries find blocks.

    Attributes:
        unpruned_class: the block's own class.
        unpruned_arguments: names of the arguments of its forward, after the tokens.
    """

    _pruneattn: BlockPruning
    unpruned_class: type[nn.Module]
    unpruned_arguments: tuple[str, ...]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The block's return value for the kept rows ``[B, extra + keep, C]``."""
        own = self._pruneattn
        patches = x.shape[1] - own.extra_tokens
        keep = kept_patches(patches, own.keep_rate)
        if keep >= patches:
            return super().forward(x, *args, **kwargs)
        _check_arguments(own, args, kwargs)
        return self.forward_pruned(x, keep)

    def forward_pruned(self, x: Tensor, keep: int) -> Any:
        """:meth:`forward` with ``keep`` patches kept."""
        own = self._pruneattn
        view, pruning = own.view(self), own.pruning
        if isinstance(pruning, ColumnMeanPruning) and view.dropout:
            pruning = FunctionPruning(_column_mean)  # the fused op has no dropout
        _, _, x, attended = pruning(view, x, view.norm(x), keep, own.extra_tokens, None)
        return view.finish(x, attended)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [super().extra_repr(), f"keep_rate={self._pruneattn.keep_rate}"]))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is created at run time: pickle must create it again instead of looking it up.
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        return _empty_block, (type(self).unpruned_class,), *reduced[2:]


def start_pruning(block: nn.Module, settings: BlockPruning) -> PrunedBlock:
    """Make a block prune, in place, with these settings. Return the block."""
    vars(block).pop("forward", None)  # equal to the method of the class, see check_forward
    unpruned: Any = type(block)  # for mypy, type[Module] is not hashable, but the cache needs it
    block.__class__ = _pruned_class(unpruned)
    assert isinstance(block, PrunedBlock)
    block._pruneattn = settings
    return block


def stop_pruning(block: PrunedBlock) -> None:
    """Undo :func:`start_pruning`."""
    vars(block).pop("forward", None)
    del block._pruneattn
    block.__class__ = type(block).unpruned_class  # type: ignore[assignment]  # the class it had before


def check_forward(block: nn.Module, path: str) -> None:
    """Check that ``forward`` was not replaced on the object.

    transformers 4.5x leaves the ``forward`` of the class on the object after it recorded hidden states. Any other
    ``forward`` would hide that of the new class, or be lost.

    Args:
        block: the block.
        path: its name in the model, for messages.

    Raises:
        UserError: the ``forward`` on the object is not that of the class.
    """
    forward = vars(block).get("forward")
    if forward is not None and getattr(forward, "__func__", None) is not type(block).forward:
        raise UserError(
            f"{path}.forward was replaced on the object, by an unknown function: prune or unprune before it is "
            "replaced (accelerate replaces it when it distributes a model over devices)"
        )


@functools.cache
def _pruned_class(unpruned: type[Any]) -> type[PrunedBlock]:
    """The class of pruning blocks that is derived from the class ``unpruned``."""
    own = {
        "unpruned_class": unpruned,
        "unpruned_arguments": tuple(inspect.signature(unpruned.forward).parameters)[2:],  # after self and the tokens
        "__module__": unpruned.__module__,
        "__qualname__": unpruned.__qualname__,
    }
    # The name stays the same: accelerate and FSDP find blocks by it.
    return type(unpruned.__name__, (PrunedBlock, unpruned), own)


def _empty_block(unpruned: Any) -> PrunedBlock:
    """A block without state, which pickle fills."""
    pruned = _pruned_class(unpruned)
    return pruned.__new__(pruned)


def _column_mean(q: Tensor, k: Tensor, v: Tensor, extra_tokens: int) -> Tensor:
    return ops.column_mean_attention(q, k, v, extra_tokens)[1]


def _check_arguments(own: BlockPruning, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    # A mask has the size of all tokens, not of the kept tokens.
    given = [f"argument {place}" for place, value in enumerate(args, 1) if value is not None and value is not False]
    given += [name for name in own.view.arguments if kwargs.get(name) is not None and kwargs[name] is not False]
    if given:
        raise UserError(
            f"{own.path}: a pruned model takes no attention mask, but got {', '.join(given)}: leave it out, or call "
            "pruneattn.unprune first"
        )
