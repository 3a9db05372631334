"""Token pruning for models of others: Hugging Face's AST and timm's vision transformers, where they are, and more.

Neither library is imported: a model is known by its parts (``timm.py`` and ``huggingface.py`` here), and before a block
is changed, it is run beside its pruning form on random weights (``checks.py``). ``block.py`` has the block that prunes.
Other families come by :func:`register_family`; ``python/prune_own_backbone.py`` is an example of one.
"""

from ..errors import UserError
from ..models.blocks import check_prune_blocks, spread_keep_rate
from ..models.scores import make_pruning
from ..models.vit import PrunedViT
from . import huggingface, timm
from .block import BlockPruning, BlockView, PrunedBlock, check_forward, start_pruning, stop_pruning
from .checks import check_block
from .trunk import Trunk

__all__ = ["BlockView", "Trunk", "prune", "register_family", "set_keep_rate", "unprune"]

_families = [timm.find, huggingface.find]


def register_family(find):
    """Make a family of models known to :func:`prune` and :func:`unprune`.

    Args:
        find: function that takes a model and returns its :class:`Trunk`, or None if it is of another family. It should
            raise a ``UserError`` if the model is of the family, but has something that pruning cannot follow. The
            family that was registered last is asked first, timm's and Hugging Face's come at the end.

    Returns:
        ``find``, so that this can be a decorator.
    """
    if find not in _families:
        _families.insert(0, find)
    return find


def prune(model, keep_rate=0.7, blocks=(3, 6, 9), score=None):
    """Prune tokens in some blocks of a model, in place: after attention's residual add, before the MLP.

    What is computed is what a model of :func:`pruneattn.create_model` computes in its pruning blocks: rows that will be
    dropped are not projected. At keep-rate 1 a block runs its own forward, bit for bit. Parameters, buffers and their
    names stay, so that ``state_dict``, ``save_pretrained`` and optimizers do not notice; ``from_pretrained`` gives an
    unpruned model. Training, autocast, gradient checkpointing, ``torch.compile``, ``copy.deepcopy`` and pickle go on
    working. A model that is pruned already is pruned anew, with these arguments only.

    Hidden states (``output_hidden_states=True``) have fewer tokens after each pruning block: the extra tokens, then the
    kept patches in their order. Refused while a model is pruned: attention masks, ``output_attentions=True``, timm's
    ``forward_intermediates`` and ``get_intermediate_layers``. Hooks on the attention module of a pruning block are not
    called, those on its parts are.

    Args:
        model: ``ASTModel`` or ``ASTForAudioClassification`` of transformers 4 or 5, or a ``VisionTransformer`` of timm
            (distilled, with register tokens, with or without a class token), another model made of the same parts, or
            one of a family that :func:`register_family` made known.
        keep_rate: share of the patches that each pruning block keeps, in (0, 1]: one number, or one per block.
        blocks: numbers of the blocks that prune, from 0, ascending.
        score: what ranks the patches: "cls" (default where there is a class token), "column_mean" (default elsewhere),
            a function ``score(q, k, v, extra_tokens)`` of queries, keys and values ``[B, H, N, D]`` that returns
            ``[B, N - extra_tokens]``, or a :class:`~pruneattn.Pruning`.

    Returns:
        The model.

    Raises:
        UserError: an argument cannot be used, or the model has not the parts that pruning needs; it is as it was then.
    """
    if isinstance(model, PrunedViT):
        raise UserError(
            "prune: this model prunes by itself: set_keep_rate changes how much, and prune_blocks and score of "
            "create_model say where and by what"
        )
    if getattr(model, "decoder", None) is not None:
        raise UserError(
            f"prune: {type(model).__name__} has a decoder, which would take the tokens that are left for others: prune the "
            "encoder alone"
        )
    trunk = _trunk_of("prune", model)
    blocks = check_prune_blocks("blocks", blocks, len(trunk.blocks))
    rates = spread_keep_rate(keep_rate, len(blocks))
    pruning = _pruning(score, trunk)
    for i in blocks:
        path = f"{trunk.path}[{i}]"
        check_forward(trunk.blocks[i], path)
        if not isinstance(trunk.blocks[i], PrunedBlock):
            check_block(trunk.blocks[i], path, trunk.view, trunk.extra_tokens)
    unprune(model)
    for i, rate in zip(blocks, rates):
        mine = BlockPruning(f"{trunk.path}[{i}]", trunk.view, trunk.extra_tokens, pruning, rate)
        start_pruning(trunk.blocks[i], mine)
    trunk.guard()
    return model


def unprune(model):
    """Undo :func:`prune`, in place. Nothing happens to a model that is not pruned. Returns the model.

    Raises:
        UserError: a model of ``create_model``, or one that :func:`prune` would not know, or a block's ``forward`` was
            replaced on the object; the model is as it was then.
    """
    if isinstance(model, PrunedViT):
        raise UserError("unprune: this model prunes by itself: model.set_keep_rate(1) keeps every patch")
    trunk, blocks = _trunk_of("unprune", model), _pruned_blocks(model)
    for block in blocks:
        check_forward(block, block._pruneattn.path)
    for block in blocks:
        stop_pruning(block)
    trunk.unguard()
    return model


def set_keep_rate(model, keep_rate):
    """Set the keep-rate of a model of ``create_model``, or of one that :func:`prune` changed.

    ``keep_rate``: share of the patches that each pruning block keeps, in (0, 1]: one number, or one per pruning block.

    Raises:
        UserError: not such a rate, or the model does not prune.
    """
    if isinstance(getattr(model, "_orig_mod", model), PrunedViT):  # compiled or not
        model.set_keep_rate(keep_rate)
        return
    blocks = _pruned_blocks(model)
    if not blocks:
        raise UserError(f"set_keep_rate: no block of this {type(model).__name__} prunes: call pruneattn.prune first")
    for block, rate in zip(blocks, spread_keep_rate(keep_rate, len(blocks))):
        block._pruneattn.keep_rate = rate


def _trunk_of(caller, model):
    """The part of a model that has the blocks, as ``timm.py`` or ``huggingface.py`` describes it."""
    # Hugging Face's models with a head name their trunk base_model; a trunk is its own.
    for candidate in (model, getattr(model, "base_model", None)):
        for find in _families:
            trunk = find(candidate)
            if trunk is not None:
                return trunk
    raise UserError(
        f"{caller}: {type(model).__name__} has no list of blocks that is known: looked for 'blocks' (timm), 'layers' "
        "and 'encoder.layer' (Hugging Face) in it and its 'base_model'. Give the model itself, not a wrapper around it, "
        "or make its family known with pruneattn.adapters.register_family"
    )


def _pruned_blocks(model):
    return [module for module in model.modules() if isinstance(module, PrunedBlock)]


def _pruning(score, trunk):
    if score is None:
        score = "cls" if trunk.class_token else "column_mean"
    if score == "cls" and not trunk.class_token:
        raise UserError("score: 'cls' needs a class token, and this model has none: use 'column_mean'")
    pruning = make_pruning(score)
    if pruning.statistic is not None:
        raise UserError(
            f"score: {score!r} ranks by the spectrogram, which only models of create_model look at: use 'cls', "
            "'column_mean' or a function of queries, keys and values"
        )
    return pruning
