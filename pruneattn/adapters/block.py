"""A block of somebody else's model that drops patches between its attention and its MLP."""

import functools
import inspect
from dataclasses import dataclass

import torch.nn.functional as F

from .. import ops
from ..errors import UserError
from ..models.blocks import MultiHead, attention, kept_patches
from ..models.scores import ColumnMeanPruning, FunctionPruning, Pruning


class BlockView(MultiHead):
    """Base of what a family's blocks are made of: the parts of a block under the names that the prunings use.

    A derived class runs the parts of ``self.block``, a transformer block that takes and returns tokens ``[B, N, C]``
    (or returns them first in a tuple) and acts on each row by itself in everything but attention. Before a block is
    changed, a copy of it with random weights is run beside what the view makes of it, so that a wrong view is refused.

    Attributes:
        block: the block.
        arguments: names of the arguments of the block's forward, beside the tokens, that are known. They are passed on
            while every patch is kept; in a pruned block any that is neither None nor False is refused.
    """

    arguments = ()

    def __init__(self, block):
        self.block = block

    @classmethod
    def check(cls, block, path):
        """Raise a ``UserError`` where a part of the block is missing or unknown; ``path`` is its name in the model.

        ``checks.py`` beside has ``expect_parts``, ``expect_linear`` and ``expect_heads`` for it.
        """
        raise NotImplementedError

    @property
    def dim(self):
        """Channels of a token, C."""
        raise NotImplementedError

    @property
    def num_heads(self):
        """Heads of the attention, H."""
        raise NotImplementedError

    @property
    def head_dim(self):
        """Channels of a head, D; H * D need not be C."""
        return self.dim // self.num_heads

    @property
    def dropout(self):
        """Rate of dropout on the softmax matrix that is in force; 0 outside training."""
        return 0.0

    def norm(self, x):
        """The tokens ``[B, N, C]`` as attention reads them; ``x`` itself where the norm comes after attention."""
        raise NotImplementedError

    def project(self, x, parts):
        """List of some of ``"q"``, ``"k"``, ``"v"`` (neighbours) for the rows ``x`` alone, ``[B, H, N, D]`` each.

        ``self.split_heads(packed)`` cuts ``[B, N, parts * H * D]`` into these.
        """
        raise NotImplementedError

    def finish(self, x, attended):
        """What the block returns for these rows, of its input ``[B, M, C]`` and of the attention output before the
        projection ``[B, M, H * D]``.
        """
        raise NotImplementedError

    def kernel(self, q, k, v):
        dropout = self.dropout
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout) if dropout else attention(q, k, v)


@dataclass
class BlockPruning:
    """How a block prunes: what it keeps beside the block's own attributes."""

    path: str  # of the block in its model, for messages
    view: type  # of BlockView
    extra_tokens: int
    pruning: Pruning
    keep_rate: float


class PrunedBlock:
    """What :func:`start_pruning` puts before a block's own class.

    The block stays the object it was: parameters, hooks, ``isinstance`` and the class's name, by which libraries find
    blocks, are the same.
    """

    def forward(self, x, *args, **kwargs):
        """The block's output for the rows that stay: ``[B, extra + keep, C]``, or in whatever the block returns it."""
        mine = self._pruneattn
        patches = x.shape[1] - mine.extra_tokens
        keep = kept_patches(patches, mine.keep_rate)
        if keep >= patches:
            return super().forward(x, *args, **kwargs)
        _check_arguments(mine, args, kwargs)
        return self.forward_pruned(x, keep)

    def forward_pruned(self, x, keep):
        mine = self._pruneattn
        view, pruning = mine.view(self), mine.pruning
        if isinstance(pruning, ColumnMeanPruning) and view.dropout:
            pruning = FunctionPruning(_column_mean)  # the op gives scores and output at once, and knows no dropout
        _, _, x, attended = pruning(view, x, view.norm(x), keep, mine.extra_tokens, None)
        return view.finish(x, attended)

    def extra_repr(self):
        return ", ".join(filter(None, [super().extra_repr(), f"keep_rate={self._pruneattn.keep_rate}"]))

    def __reduce_ex__(self, protocol):
        # The class is made at run time, so that pickle must make it again instead of looking it up.
        _, _, *state = super().__reduce_ex__(max(protocol, 2))
        return _empty_block, (type(self).unpruned_class,), *state


def start_pruning(block, mine):
    """Make a block prune, where it is, as ``mine`` (BlockPruning) says."""
    vars(block).pop("forward", None)  # the class's own, by check_forward
    block._pruneattn = mine
    block.__class__ = _pruned_class(type(block))


def stop_pruning(block):
    """Undo :func:`start_pruning`."""
    vars(block).pop("forward", None)
    del block._pruneattn
    block.__class__ = type(block).unpruned_class


def check_forward(block, path):
    """Raise a ``UserError`` where the object's ``forward`` is not its class's. transformers 4.5x leaves the class's own
    on the object after it recorded hidden states; what others put there would go on in spite of the class, or be lost.
    """
    forward = vars(block).get("forward")
    if forward is not None and getattr(forward, "__func__", None) is not type(block).forward:
        raise UserError(
            f"{path}.forward was replaced on the object, and pruning cannot tell by what: prune, or unprune, before "
            "that is done (accelerate does it when it spreads a model over devices)"
        )


@functools.cache
def _pruned_class(unpruned):
    own = {
        "unpruned_class": unpruned,
        "unpruned_arguments": tuple(inspect.signature(unpruned.forward).parameters)[2:],  # after self and the tokens
        "__module__": unpruned.__module__,
        "__qualname__": unpruned.__qualname__,
    }
    # The name stays: accelerate and FSDP find blocks by it.
    return type(unpruned.__name__, (PrunedBlock, unpruned), own)


def _empty_block(unpruned):
    pruned = _pruned_class(unpruned)
    return pruned.__new__(pruned)


def _column_mean(q, k, v, extra_tokens):
    return ops.column_mean_attention(q, k, v, extra_tokens)[1]


def _check_arguments(mine, args, kwargs):
    # A mask fits all tokens, not those that are left.
    given = [f"argument {place}" for place, value in enumerate(args, 1) if value is not None and value is not False]
    given += [name for name in mine.view.arguments if kwargs.get(name) is not None and kwargs[name] is not False]
    if given:
        raise UserError(
            f"{mine.path}: a pruned model takes no attention mask, and was given {', '.join(given)}: leave it out, or "
            "use pruneattn.unprune first"
        )
