"""``optimize_for_inference`` for models of this package and of other libraries."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..models import optimize
from ..models.optimize import PackedLinear, can_pack, check_dtype, lock
from ..models.vit import PrunedViT, unwrapped
from .block import AdaptedBlock, BlockSettings, adapt, check_forward, optimized_blocks, pruned_blocks
from .checks import check_block
from .families import find_trunk
from .packing import pack

_Model = TypeVar("_Model", bound=nn.Module)


def optimize_for_inference(model: _Model, dtype: torch.dtype | None = None) -> _Model:
    """Prepare a model for fast inference, in place.

    On a CPU the weights of the blocks are packed once for oneDNN, bias, GELU and residual add are fused into the
    matrix products, and attention runs this package's kernels in every block. Keep-rates can still be changed, and
    ``state_dict``, ``copy.deepcopy``, pickle and ``save_pretrained`` keep working. Training, moving, casting, loading
    weights and autocast are rejected with an error that says why. ``torch.compile`` runs the packed layers outside of
    its graphs. On other devices the weights are not packed: use ``torch.compile`` there.

    In models of other libraries, a linear layer with hooks, with parametrized or quantized weights, or within a wrapper
    (LoRA) is not packed. Hooks on the attention, the MLP and the dropout of a block are not called.

    Args:
        model: model of :func:`pruneattn.create_model`, with its weights loaded; a model that :func:`prune` accepts,
            pruned or not; or a ``WhisperModel`` or ``WhisperForConditionalGeneration``, whose encoder is packed.
        dtype: ``torch.float32`` or ``torch.bfloat16``: precision of weights and activations. None: the model's current
            precision. Inputs may be float32; scores are always float32; logits have this dtype.

    Returns:
        The model, in eval mode, without gradients; without its wrapper if ``torch.compile`` wraps it.

    Raises:
        UserError: the model is of an unknown family or has an unsupported part, or the dtype is not supported. The
            model is not changed.
    """
    model = cast("_Model", unwrapped(model))
    if isinstance(model, PrunedViT):
        return cast("_Model", optimize.optimize_for_inference(model, dtype))
    trunk = find_trunk("optimize_for_inference", model)
    done = optimized_blocks(model)
    check_dtype(dtype, _packed_dtype(done))
    if done:
        return model.eval().requires_grad_(False)
    parameters = itertools.chain.from_iterable(block.parameters() for block in trunk.blocks)
    like = next(filter(torch.is_floating_point, parameters), None)
    packable = like is not None and can_pack(like.new_empty(0, dtype=dtype))
    if packable:
        for i, block in enumerate(trunk.blocks):
            path = f"{trunk.path}[{i}]"
            check_forward(block, path)
            check_block(block, path, trunk.view, trunk.extra_tokens, packed=True)
    if dtype is not None:
        model.to(dtype=dtype)
    model.eval().requires_grad_(False)
    assert trunk.module is not None  # find_trunk sets it
    hooks = trunk.module._forward_pre_hooks
    if _convert_inputs not in hooks.values():
        trunk.module.register_forward_pre_hook(_convert_inputs, prepend=True, with_kwargs=True)
    if not packable:
        return model
    for i, block in enumerate(trunk.blocks):
        if not isinstance(block, AdaptedBlock):
            adapt(block, BlockSettings(f"{trunk.path}[{i}]", i, trunk.view, trunk.extra_tokens))
        settings = cast("AdaptedBlock", block)._pruneattn
        pack(block, trunk.view.joint_projection, settings.pruning.parts if settings.pruning else ("qkv",))
        settings.optimized = True
    if not pruned_blocks(model):  # the guard of a pruned model rejects the same calls, and more
        trunk.guard_optimized()
    lock(model)
    return model


def _convert_inputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Convert floating-point inputs of a call to the precision of the model."""
    dtype = next(filter(torch.is_floating_point, module.parameters())).dtype

    def convert(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(map(convert, args)), {name: convert(value) for name, value in kwargs.items()}


def _packed_dtype(blocks: list[AdaptedBlock]) -> torch.dtype | None:
    """The dtype of the first packed layer of these blocks; None if there is none."""
    modules = itertools.chain.from_iterable(block.modules() for block in blocks)
    return next((module.packed.dtype for module in modules if isinstance(module, PackedLinear)), None)
