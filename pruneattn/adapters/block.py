"""A block of another library's model that drops patches between its attention and its MLP, or runs packed layers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
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
        joint_projection: path in the block of the linear layer that projects to queries, keys and values together, in
            this order; empty if there is none. :func:`pruneattn.optimize_for_inference` replaces it with a
            :class:`~pruneattn.models.packed.PackedQKV`, which ``project`` must support, and each other linear layer
            of the block with a packed layer that is called in the same way.
    """

    arguments: tuple[str, ...] = ()
    joint_projection: str = ""

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

    def finish_packed(self, x: Tensor, attended: Tensor) -> Any:
        """:meth:`finish` in an optimized block, in eval mode: ``add`` and ``activate`` of ``packing.py`` fuse steps.

        The base class runs ``finish``, whose linear layers are packed too, but not fused.
        """
        return self.finish(x, attended)

    def kernel(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention output ``[B, H, N, D]``, with dropout in training."""
        dropout = self.dropout
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout) if dropout else attention(q, k, v)


@dataclass
class BlockSettings:
    """Settings of an adapted block, held next to the block's own attributes.

    Attributes:
        path: name of the block in its model, for messages.
        number: number of the block in its model, from 0.
        view: class of the view.
        extra_tokens: number of tokens at the front that are not patches.
        optimized: whether the block's layers are packed.
        pruning: ranks the patches; None if the block does not prune.
        score: name of the score; None if it has none.
        keep_rate: in (0, 1].
        config: configuration of the model, which records the pruning; None if there is none.
    """

    path: str
    number: int
    view: type[BlockView]
    extra_tokens: int
    optimized: bool = False
    pruning: Pruning | None = None
    score: str | None = None
    keep_rate: float = 1.0
    config: Any = None


class AdaptedBlock(nn.Module):
    """Class that :func:`adapt` puts before a block's own class, to prune, to run packed layers, or both.

    The block remains the same object, with the same parameters, hooks and ``isinstance`` results. Its class keeps its
    name, by which libraries find blocks.

    Attributes:
        own_class: the block's own class.
        own_arguments: names of the arguments of its forward, after the tokens.
    """

    _pruneattn: BlockSettings
    own_class: type[nn.Module]
    own_arguments: tuple[str, ...]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The block's return value for the kept rows ``[B, extra + keep, C]``."""
        run = self._run_optimized if self._pruneattn.optimized else self._run
        return run(x, args, kwargs)

    @torch.compiler.disable  # one graph break per block, not one per packed layer
    def _run_optimized(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        _check_mode(self)
        return self._run(x, args, kwargs)

    def _run(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        own = self._pruneattn
        patches = x.shape[1] - own.extra_tokens
        keep = patches if own.pruning is None else kept_patches(patches, own.keep_rate)
        given = _unsupported_arguments(own, args, kwargs)
        if keep < patches:
            if given:
                raise UserError(
                    f"{own.path}: a pruned model takes no attention mask and returns no attentions, but got "
                    f"{', '.join(given)}: leave it out, or call pruneattn.unprune first"
                )
            return self.forward_pruned(x, keep)
        # Masks and attention weights need the block's own attention, which calls packed layers like any others.
        return self.forward_packed(x) if own.optimized and not given else super().forward(x, *args, **kwargs)

    def forward_packed(self, x: Tensor) -> Any:
        """:meth:`forward` of an optimized block that keeps every patch."""
        view = self._pruneattn.view(self)
        return view.finish_packed(x, view.attend(*view.project(view.norm(x), "qkv")))

    def forward_pruned(self, x: Tensor, keep: int) -> Any:
        """:meth:`forward` with ``keep`` patches kept."""
        own = self._pruneattn
        view, pruning = own.view(self), own.pruning
        assert pruning is not None
        if isinstance(pruning, ColumnMeanPruning) and view.dropout:
            pruning = FunctionPruning(_column_mean)  # the fused op has no dropout
        _, _, x, attended = pruning(view, x, view.norm(x), keep, own.extra_tokens, None)
        return view.finish_packed(x, attended) if own.optimized else view.finish(x, attended)

    def extra_repr(self) -> str:
        own = self._pruneattn
        rate = f"keep_rate={own.keep_rate}" if own.pruning is not None else ""
        return ", ".join(filter(None, [super().extra_repr(), rate, "optimized" if own.optimized else ""]))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is created at run time: pickle must create it again instead of looking it up.
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        return _empty_block, (type(self).own_class,), *reduced[2:]


def adapt(block: nn.Module, settings: BlockSettings) -> AdaptedBlock:
    """Give a block these settings, in place. Return the block."""
    if not isinstance(block, AdaptedBlock):
        vars(block).pop("forward", None)  # equal to the method of the class, see check_forward
        own: Any = type(block)  # for mypy, type[Module] is not hashable, but the cache needs it
        block.__class__ = _adapted_class(own)
    assert isinstance(block, AdaptedBlock)
    block._pruneattn = settings
    return block


def restore(block: AdaptedBlock) -> None:
    """Undo :func:`adapt`."""
    vars(block).pop("forward", None)
    del block._pruneattn
    block.__class__ = type(block).own_class  # type: ignore[assignment]  # the class it had before


def adapted_blocks(model: nn.Module) -> list[AdaptedBlock]:
    """The blocks that prune or are optimized, in the order of the model's modules."""
    return [module for module in model.modules() if isinstance(module, AdaptedBlock)]


def pruned_blocks(model: nn.Module) -> list[AdaptedBlock]:
    """The blocks that prune, in the order of the model's modules."""
    return [block for block in adapted_blocks(model) if block._pruneattn.pruning is not None]


def optimized_blocks(model: nn.Module) -> list[AdaptedBlock]:
    """The blocks with packed layers, in the order of the model's modules."""
    return [block for block in adapted_blocks(model) if block._pruneattn.optimized]


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
            f"{path}.forward was replaced on the object, by an unknown function: prune, unprune or optimize before it "
            "is replaced (accelerate replaces it when it distributes a model over devices)"
        )


@functools.cache
def _adapted_class(own: type[Any]) -> type[AdaptedBlock]:
    """The class of adapted blocks that is derived from the class ``own``."""
    attributes = {
        "own_class": own,
        "own_arguments": tuple(inspect.signature(own.forward).parameters)[2:],  # after self and the tokens
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
    }
    # The name stays the same: accelerate and FSDP find blocks by it.
    return type(own.__name__, (AdaptedBlock, own), attributes)


def _empty_block(own: Any) -> AdaptedBlock:
    """A block without state, which pickle fills."""
    adapted = _adapted_class(own)
    return adapted.__new__(adapted)


def _column_mean(q: Tensor, k: Tensor, v: Tensor, extra_tokens: int) -> Tensor:
    return ops.column_mean_attention(q, k, v, extra_tokens)[1]


def _check_mode(block: nn.Module) -> None:
    """Check that an optimized block is neither in training mode nor in autocast."""
    if block.training:
        raise UserError("training: the model was optimized for inference: call eval(), or load it again to train it")
    if torch.is_autocast_enabled("cpu"):
        raise UserError(
            "autocast: the model was optimized for inference, and its weights are packed; call it outside autocast, "
            "and pass the dtype to optimize_for_inference"
        )


def _unsupported_arguments(own: BlockSettings, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """Names of the given arguments that need the softmax matrix of all tokens: masks, and requests for the matrix."""
    given = [f"argument {place}" for place, value in enumerate(args, 1) if value is not None and value is not False]
    given += [name for name in own.view.arguments if kwargs.get(name) is not None and kwargs[name] is not False]
    return given
