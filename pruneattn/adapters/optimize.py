"""``optimize_for_inference`` for models of this package and of other libraries."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..models import optimize
from ..models.packed import can_pack, lock, pack, packed_dtype
from ..models.quantize import Inputs, Precision, convert, resolve
from ..models.vit import PrunedViT, unwrapped
from .block import AdaptedBlock, BlockSettings, adapt, check_forward, optimized_blocks, pruned_blocks
from .checks import check_block
from .families import find_trunk
from .keep_rate import at_keep_rate

_Model = TypeVar("_Model", bound=nn.Module)


def optimize_for_inference(model: _Model, dtype: Precision = None, calibrate: Iterable[Inputs] | None = None) -> _Model:
    """Prepare a model for fast inference, in place.

    On a CPU the weights of the blocks are packed once for oneDNN, bias, GELU and residual add are fused into the
    matrix products, and attention runs this package's kernels in every block. Keep-rates can still be changed, and
    ``state_dict``, ``copy.deepcopy``, pickle and ``save_pretrained`` keep working. Training, moving, casting, loading
    weights and autocast are rejected with an error that says why. ``torch.compile`` runs the packed layers outside of
    its graphs. On other devices the weights are not packed: use ``torch.compile`` there.

    After optimization with ``torch.int8``, ``print(model.quantization)`` shows which layers have 8-bit weights, and why
    others have not. The ``state_dict`` has dequantized weights, with a warning. :func:`pruneattn.save_pretrained` of a
    model of this package and pickle keep the 8-bit weights. Where 8 bits would be slower than floating point,
    ``torch.int8`` runs floating point, with a warning.

    In models of other libraries, a linear layer with hooks, with parametrized or quantized weights, or within a wrapper
    (LoRA) is not packed. Hooks on the attention, the MLP and the dropout of a block are not called.

    Args:
        model: model of :func:`pruneattn.create_model`, with its weights loaded; a model that :func:`prune` accepts,
            pruned or not; or a ``WhisperModel`` or ``WhisperForConditionalGeneration``, whose encoder is packed.
        dtype: ``torch.float32`` or ``torch.bfloat16``: precision of weights and activations. ``torch.int8``: 8-bit
            weights in the linear layers of the blocks, one scale per output channel; each row of their inputs is
            quantized when they run. Everything else, such as attention and logits, is bfloat16 where the CPU has
            instructions for it, else float32. ``"auto"``: the fastest of the three on this CPU. None: the model's
            current precision. Inputs may be float32; scores are always float32.
        calibrate: with 8-bit weights, batches to measure the error that they cause in the output of each layer; layers
            above 5 % stay in floating point. Each is the input of a call: a tensor, a tuple of positional arguments or
            a dict of keyword arguments. None: layers whose weights have an error above 3 % stay in floating point.

    Returns:
        The model, in eval mode, without gradients; without its wrapper if ``torch.compile`` wraps it.

    Raises:
        UserError: the model is of an unknown family or has an unsupported part, or the dtype is not supported. The
            model is not changed. Or ``calibrate`` is empty or causes values that are not finite.
    """
    model = cast("_Model", unwrapped(model))
    if isinstance(model, PrunedViT):
        return cast("_Model", optimize.optimize_for_inference(model, dtype, calibrate))
    trunk = find_trunk("optimize_for_inference", model)
    done, blocks = optimized_blocks(model), list(trunk.blocks)
    parameters = itertools.chain.from_iterable(block.parameters() for block in blocks)
    like = next(filter(torch.is_floating_point, parameters), torch.empty(0))
    packed = next(filter(None, map(packed_dtype, done)), None)
    chosen = resolve(dtype, like.device, packed)
    if done:
        return model.eval().requires_grad_(False)
    packable = chosen == torch.int8 or can_pack(like.new_empty(0, dtype=chosen))
    if packable:
        for i, block in enumerate(blocks):
            path = f"{trunk.path}[{i}]"
            check_forward(block, path)
            check_block(block, path, trunk.view, trunk.extra_tokens, packed=True)
    model.eval().requires_grad_(False)
    with at_keep_rate(model, 1.0) if pruned_blocks(model) else nullcontext():
        int8 = convert(model, blocks, chosen, calibrate)
    assert trunk.module is not None  # find_trunk sets it
    hooks = trunk.module._forward_pre_hooks
    if _convert_inputs not in hooks.values():
        trunk.module.register_forward_pre_hook(_convert_inputs, prepend=True, with_kwargs=True)
    if not packable:
        return model
    for i, block in enumerate(blocks):
        if not isinstance(block, AdaptedBlock):
            adapt(block, BlockSettings(f"{trunk.path}[{i}]", i, trunk.view, trunk.extra_tokens))
        settings = cast("AdaptedBlock", block)._pruneattn
        parts = settings.pruning.parts if settings.pruning else ("qkv",)
        pack(block, trunk.view.joint_projection, parts, int8)
        settings.optimized = True
    if not pruned_blocks(model):  # the guard of a pruned model rejects the same calls, and more
        trunk.guard_optimized()
    lock(model)
    return model


def _convert_inputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Convert floating-point inputs of a call to the precision of the model."""
    # With 8-bit weights, layer norms have float32, and other parameters maybe bfloat16.
    dtype = min((p.dtype for p in module.parameters() if p.is_floating_point()), key=lambda dtype: dtype.itemsize)

    def convert(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(map(convert, args)), {name: convert(value) for name, value in kwargs.items()}
