"""Token pruning for models of other libraries: Hugging Face's AST, timm's vision transformers, and further families.

Neither library is imported: a model is recognized by its parts (``timm.py`` and ``huggingface.py``). Before a block is
changed, its pruning form is compared with it on random weights (``checks.py``). ``block.py`` contains the block that
prunes. :func:`register_family` adds other families; ``python/prune_own_backbone.py`` is an example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from torch import nn

from ..errors import UserError
from ..models.blocks import check_prune_blocks, spread_keep_rate
from ..models.scores import Pruning, Score, make_pruning
from ..models.vit import PrunedViT
from . import huggingface, timm
from .block import BlockPruning, BlockView, PrunedBlock, check_forward, start_pruning, stop_pruning
from .checks import check_block
from .keep_rate import at_keep_rate, pruned_blocks, set_keep_rate
from .trunk import Trunk

__all__ = ["BlockView", "Trunk", "at_keep_rate", "prune", "register_family", "set_keep_rate", "unprune"]

_Find = Callable[[Any], Trunk | None]
_AnyFind = TypeVar("_AnyFind", bound=_Find)
_Model = TypeVar("_Model", bound=nn.Module)

_families: list[_Find] = [timm.find, huggingface.find]


def register_family(find: _AnyFind) -> _AnyFind:
    """Add a family of models to :func:`prune` and :func:`unprune`.

    Args:
        find: function that takes a model and returns its :class:`Trunk`, or None if the model is of another family. It
            should raise a ``UserError`` if the model is of the family, but has a part that pruning does not support.
            The last registered family is tried first; the families of timm and Hugging Face are tried last.

    Returns:
        ``find``, so that this can be a decorator.
    """
    if find not in _families:
        _families.insert(0, find)
    return find


def prune(
    model: _Model,
    keep_rate: float | Sequence[float] = 0.7,
    prune_blocks: Iterable[int] | None = None,
    score: Score | None = None,
    *,
    blocks: Iterable[int] | None = None,
) -> _Model:
    """Prune tokens in some blocks of a model, in place: after attention's residual add, before the MLP.

    The pruning blocks compute the same result as those of :func:`pruneattn.create_model`: dropped rows are not
    projected. At keep-rate 1 a block runs its own forward, bit for bit. Parameters, buffers and their names do not
    change, so ``state_dict``, ``save_pretrained`` and optimizers are not affected; ``from_pretrained`` returns an
    unpruned model. Training, autocast, gradient checkpointing, ``torch.compile``, ``copy.deepcopy`` and pickle keep
    working. A model that is already pruned is pruned again, with the new arguments only.

    Hidden states (``output_hidden_states=True``) have fewer tokens after each pruning block: the extra tokens, then the
    kept patches in their order. While a model is pruned, these are rejected with an error that says why: attention
    masks, ``output_attentions=True``, timm's ``forward_intermediates`` and ``get_intermediate_layers``. Hooks on the
    attention module of a pruning block are not called; hooks on its parts are.

    Args:
        model: ``ASTModel`` or ``ASTForAudioClassification`` of transformers 4 or 5; a ``VisionTransformer`` of timm
            (distilled, with register tokens, with or without a class token); another model with the same parts; or a
            model of a family that :func:`register_family` added.
        keep_rate: fraction of the patches that each pruning block keeps, in (0, 1]: one number, or one per pruning
            block.
        prune_blocks: numbers of the blocks that prune, from 0, ascending. None: the family's default, (3, 6, 9).
        score: ranks the patches: "cls" (default if there is a class token), "column_mean" (default otherwise), a
            function ``score(q, k, v, extra_tokens)`` of queries, keys and values ``[B, H, N, D]`` that returns
            ``[B, N - extra_tokens]``, or a :class:`~pruneattn.Pruning`.
        blocks: alias of ``prune_blocks``.

    Returns:
        The model.

    Raises:
        UserError: an argument is invalid, or the model lacks a part that pruning needs. The model is not changed.
    """
    if isinstance(model, PrunedViT):
        raise UserError(
            "prune: this model already has pruning blocks: change its keep-rate with set_keep_rate, and choose its "
            "blocks and score with the arguments prune_blocks and score of create_model"
        )
    if getattr(model, "decoder", None) is not None:
        raise UserError(
            f"prune: {type(model).__name__} has a decoder, which would receive the kept tokens at wrong positions: "
            "prune the encoder alone"
        )
    if blocks is not None and prune_blocks is not None:
        raise UserError("prune_blocks: cannot be used together with its alias blocks: use only prune_blocks")
    trunk = _trunk_of("prune", model)
    chosen = prune_blocks if blocks is None else blocks
    numbers = check_prune_blocks(trunk.prune_blocks if chosen is None else chosen, len(trunk.blocks))
    rates = spread_keep_rate(keep_rate, len(numbers))
    pruning = _pruning(score, trunk)
    for i in numbers:
        path = f"{trunk.path}[{i}]"
        check_forward(trunk.blocks[i], path)
        if not isinstance(trunk.blocks[i], PrunedBlock):
            check_block(trunk.blocks[i], path, trunk.view, trunk.extra_tokens)
    unprune(model)
    for i, rate in zip(numbers, rates, strict=True):
        own = BlockPruning(f"{trunk.path}[{i}]", trunk.view, trunk.extra_tokens, pruning, rate)
        start_pruning(trunk.blocks[i], own)
    trunk.guard()
    return model


def unprune(model: _Model) -> _Model:
    """Undo :func:`prune`, in place. A model that is not pruned does not change.

    Args:
        model: a model that :func:`prune` accepts.

    Returns:
        The model.

    Raises:
        UserError: the model is of ``create_model`` or of an unknown family, or the ``forward`` of a block was replaced
            on the object. The model is not changed.
    """
    if isinstance(model, PrunedViT):
        raise UserError("unprune: this model was created with pruning blocks: model.set_keep_rate(1) keeps all patches")
    trunk, pruned = _trunk_of("unprune", model), pruned_blocks(model)
    for block in pruned:
        check_forward(block, block._pruneattn.path)
    for block in pruned:
        stop_pruning(block)
    trunk.unguard()
    return model


def _trunk_of(caller: str, model: nn.Module) -> Trunk:
    """The part of a model that contains the blocks, described by the first family that recognizes it."""
    # Hugging Face's models with a head have their trunk in base_model. The base_model of a trunk is the trunk itself.
    for candidate in (model, getattr(model, "base_model", None)):
        for find in _families:
            trunk = find(candidate)
            if trunk is not None:
                return trunk
    raise UserError(
        f"{caller}: {type(model).__name__} has no known list of blocks: looked for 'blocks' (timm), 'layers' "
        "and 'encoder.layer' (Hugging Face) in it and in its 'base_model'. Pass the model itself, not a wrapper around "
        "it, or add its family with pruneattn.adapters.register_family"
    )


def _pruning(score: Score | None, trunk: Trunk) -> Pruning:
    """The pruning for a score; the family's default if ``score`` is None."""
    if score is None:
        score = "cls" if trunk.class_token else "column_mean"
    if score == "cls" and not trunk.class_token:
        raise UserError("score: 'cls' needs a class token, and this model has none: use 'column_mean'")
    pruning = make_pruning(score)
    if pruning.statistic is not None:
        raise UserError(
            f"score: {score!r} ranks by the spectrogram, which only models of create_model support: use 'cls', "
            "'column_mean' or a function of queries, keys and values"
        )
    return pruning
