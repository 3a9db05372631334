"""Token pruning and packed layers for models of other libraries: Hugging Face's AST and Whisper encoders, timm's
vision transformers, and further families.

No library is imported: a model is recognized by its parts (``timm.py``, ``huggingface.py``, ``whisper.py``). Before a
block is changed, its new form is compared with it on random weights (``checks.py``). ``block.py`` contains the block
that prunes and runs packed layers, ``optimize.py`` the optimization for inference, and ``record.py`` the record of the
pruning in a model's configuration. :func:`register_family` adds other families; ``python/prune_own_backbone.py`` is an
example.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from torch import nn

from ..errors import UserError
from ..models.blocks import check_prune_blocks, spread_keep_rate
from ..models.packed import pack
from ..models.scores import Pruning, Score, make_pruning
from ..models.vit import PrunedViT, unwrapped
from .block import (
    AdaptedBlock,
    BlockSettings,
    BlockView,
    adapt,
    check_forward,
    optimized_blocks,
    pruned_blocks,
    restore,
)
from .checks import check_block
from .families import candidates, find_trunk, register_family
from .keep_rate import at_keep_rate, set_keep_rate
from .optimize import optimize_for_inference
from .record import config_of, forget, record
from .trunk import Trunk

__all__ = [
    "BlockView",
    "Trunk",
    "at_keep_rate",
    "optimize_for_inference",
    "prune",
    "register_family",
    "set_keep_rate",
    "unprune",
]

_Model = TypeVar("_Model", bound=nn.Module)


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
    change, so ``state_dict``, ``save_pretrained`` and optimizers are not affected. Training, autocast, gradient
    checkpointing, ``torch.compile``, ``copy.deepcopy`` and pickle keep working. A model that is already pruned is
    pruned again, with the new arguments only. A model that was optimized for inference can be pruned, too.

    In a Hugging Face model, ``model.config.pruneattn`` records the keep-rates, the blocks and the name of the score.
    ``save_pretrained`` stores the record. ``from_pretrained`` returns an unpruned model with the record, and
    ``prune(model, **model.config.pruneattn)`` prunes it in the same way. :func:`set_keep_rate` and
    :func:`at_keep_rate` update the record. A score that has no name leaves no record.

    Hidden states (``output_hidden_states=True``) have fewer tokens after each pruning block: the extra tokens, then the
    kept patches in their order. While a model is pruned, these are rejected with an error that says why: attention
    masks, ``output_attentions=True``, timm's ``forward_intermediates`` and ``get_intermediate_layers``. Hooks on the
    attention module of a pruning block are not called; hooks on its parts are.

    Args:
        model: ``ASTModel``, ``ASTForAudioClassification``, ``WhisperEncoder`` or ``WhisperForAudioClassification`` of
            transformers 4 or 5; a ``VisionTransformer`` of timm (distilled, with register tokens, with or without a
            class token); another model with the same parts; or a model of a family that :func:`register_family`
            added. It can be wrapped by ``torch.compile`` or by PEFT.
        keep_rate: fraction of the patches that each pruning block keeps, in (0, 1]: one number, or one per pruning
            block.
        prune_blocks: numbers of the blocks that prune, from 0, ascending. None: the family's default, (3, 6, 9), or
            (1,) for Whisper.
        score: ranks the patches: "cls" (default if there is a class token), "column_mean" (default otherwise), a
            function ``score(q, k, v, extra_tokens)`` of queries, keys and values ``[B, H, N, D]`` that returns
            ``[B, N - extra_tokens]``, or a :class:`~pruneattn.Pruning`.
        blocks: alias of ``prune_blocks``.

    Returns:
        The model.

    Raises:
        UserError: an argument is invalid, or the model lacks a part that pruning needs. The model is not changed.
    """
    if isinstance(unwrapped(model), PrunedViT):
        raise UserError(
            "prune: this model already has pruning blocks: change its keep-rate with set_keep_rate, and choose its "
            "blocks and score with the arguments prune_blocks and score of create_model"
        )
    if any(getattr(candidate, "decoder", None) is not None for candidate in candidates(model)):
        raise UserError(
            f"prune: {type(model).__name__} has a decoder, which would receive the kept tokens at wrong positions: "
            "prune the encoder alone"
        )
    if blocks is not None and prune_blocks is not None:
        raise UserError("prune_blocks: cannot be used together with its alias blocks: use only prune_blocks")
    trunk = find_trunk("prune", model)
    chosen = prune_blocks if blocks is None else blocks
    numbers = check_prune_blocks(trunk.prune_blocks if chosen is None else chosen, len(trunk.blocks))
    rates = spread_keep_rate(keep_rate, len(numbers))
    name, pruning = _pruning(score, trunk)
    for i in numbers:
        path = f"{trunk.path}[{i}]"
        check_forward(trunk.blocks[i], path)
        if not isinstance(trunk.blocks[i], AdaptedBlock):
            check_block(trunk.blocks[i], path, trunk.view, trunk.extra_tokens)
    unprune(model)
    for i, rate in zip(numbers, rates, strict=True):
        block, settings = trunk.blocks[i], BlockSettings(f"{trunk.path}[{i}]", i, trunk.view, trunk.extra_tokens)
        if isinstance(block, AdaptedBlock):  # it is optimized
            settings = block._pruneattn
            pack(block, trunk.view.joint_projection, pruning.parts)
        config = config_of(trunk.module)
        adapt(block, replace(settings, pruning=pruning, score=name, keep_rate=rate, config=config))
    trunk.guard()
    record(model)
    return model


def unprune(model: _Model) -> _Model:
    """Undo :func:`prune`, in place, and remove its record from the model's configuration.

    The blocks of a model that is not pruned do not change.

    Args:
        model: a model that :func:`prune` accepts.

    Returns:
        The model.

    Raises:
        UserError: the model is of ``create_model`` or of an unknown family, or the ``forward`` of a block was replaced
            on the object. The model is not changed.
    """
    if isinstance(unwrapped(model), PrunedViT):
        raise UserError("unprune: this model was created with pruning blocks: model.set_keep_rate(1) keeps all patches")
    trunk, pruned = find_trunk("unprune", model), pruned_blocks(model)
    for block in pruned:
        check_forward(block, block._pruneattn.path)
    for block in pruned:
        if block._pruneattn.optimized:
            pack(block, trunk.view.joint_projection, ("qkv",))
            adapt(block, replace(block._pruneattn, pruning=None, score=None, keep_rate=1.0, config=None))
        else:
            restore(block)
    trunk.unguard()
    if optimized_blocks(model):
        trunk.guard_optimized()
    forget(trunk.module)
    return model


def _pruning(score: Score | None, trunk: Trunk) -> tuple[str | None, Pruning]:
    """Name and pruning of a score; those of the family's default if ``score`` is None."""
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
    return (score if isinstance(score, str) else None), pruning
