"""Checks that a block has the parts that pruning supports, and that it combines them as its view does."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.packed import pack
from ..models.scores import make_pruning
from .block import AdaptedBlock, BlockSettings, BlockView, adapt, restore


def check_block(block: nn.Module, path: str, view: type[BlockView], extra_tokens: int, packed: bool = False) -> None:
    """Check that pruning supports a block, and optionally that packing does. The block is not changed.

    Names and shapes of the parts are checked first, for a message that names the problem. Then a copy of the block with
    random weights is compared with its pruning form that keeps every patch.

    Args:
        block: the block.
        path: its name in the model, for messages.
        view: class of the view.
        extra_tokens: number of tokens at the front that are not patches.
        packed: compare the block with its packed form as well.

    Raises:
        UserError: pruning does not support the block.
    """
    view.check(block, path)
    own: type[nn.Module] = block.own_class if isinstance(block, AdaptedBlock) else type(block)
    names = list(inspect.signature(own.forward).parameters.values())[2:]  # after the block and its tokens
    unknown = [p.name for p in names if p.kind is not p.VAR_KEYWORD and p.name not in view.arguments]
    if unknown:
        raise UserError(f"{path} takes {', '.join(unknown)} in addition to its tokens, which pruning does not support")
    try:
        required = {p.name: None for p in names if p.kind is not p.VAR_KEYWORD and p.default is p.empty}
        error = _difference(block, BlockSettings(path, 0, view, extra_tokens), required, packed)
    except UserError:
        raise
    except Exception as failure:  # a block of another library may raise anything
        raise UserError(f"{path}: a copy of the block could not be run alone, to check it: {failure}") from failure
    # Rounding errors are far below this limit in every dtype; differences in arithmetic are far above it.
    if not error < 0.03:
        raise UserError(
            f"{path} has the parts of a ViT's block, but combines them differently: its output differs by {error:.0%} "
            "from that of attention and MLP, each after its norm and added to its input"
        )


@torch.no_grad()
def _difference(block: nn.Module, settings: BlockSettings, arguments: dict[str, None], packed: bool) -> float:
    """Relative difference between a block and its adapted form, in the part that they add to their input.

    Args:
        block: the block.
        settings: settings of the adapted form.
        arguments: arguments that the block's forward needs in addition to the tokens.
        packed: whether to compare the packed form as well.
    """
    block = copy.deepcopy(block).eval()
    if isinstance(block, AdaptedBlock):
        restore(block)
    if packed:
        block.float()
    for module in block.modules():  # hooks expect the user's tokens, not random tokens
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    if any(parameter.is_meta for parameter in block.parameters()):
        block.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)  # does not change the global generator

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)

    for parameter in filter(torch.is_floating_point, block.parameters()):
        fan_in = parameter.shape[-1] if parameter.dim() > 1 else 1
        parameter.copy_(random(*parameter.shape) / fan_in**0.5)
    like = next(filter(torch.is_floating_point, block.parameters()))
    patches = 6
    x = random(2, settings.extra_tokens + patches, settings.view(block).dim).to(like)  # [B, N, C]
    expected = _tokens(block(x, **arguments)) - x

    def error(output: Any) -> float:
        return ((_tokens(output) - x - expected).float().norm() / expected.float().norm()).item()

    adapted, errors = adapt(block, settings), []
    for optimized in (False, True)[: 1 + packed]:
        if optimized:
            pack(block, settings.view.joint_projection, ("qkv",))
            settings.optimized = True
            errors.append(error(adapted.forward_packed(x)))
        for score in ("column_mean", "cls"):  # column_mean projects queries, keys and values together, cls separately
            settings.pruning = make_pruning(score)
            errors.append(error(adapted.forward_pruned(x, patches)))
    return max(errors)


def _tokens(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def expect_parts(module: nn.Module, path: str, required: Sequence[str], optional: Sequence[str] = ()) -> None:
    """Check the names of a module's parts: submodules, parameters and buffers.

    Args:
        module: the module.
        path: its name in the model, for messages.
        required: names that must exist.
        optional: further names that may exist.

    Raises:
        UserError: a required part is missing, or there is an unknown part.
    """
    children = itertools.chain(module.named_children(), module._parameters.items(), module._buffers.items())
    found = [name for name, part in children if part is not None]
    missing = [name for name in required if name not in found]
    unknown = [name for name in found if name not in (*required, *optional)]
    kind = type(module).__name__
    if missing:
        there = ", ".join(found)
        raise UserError(f"{path} ({kind}) has no {missing[0]!r}: expected {', '.join(required)}, found {there}")
    if unknown:
        raise UserError(f"{path} ({kind}) has {unknown[0]!r}, a part that pruning does not support")


def expect_heads(module: nn.Module, path: str, name: str) -> int:
    """Return a module's number of heads.

    Args:
        module: the module.
        path: its name in the model, for messages.
        name: the attribute with the number.

    Raises:
        UserError: the attribute is not a positive integer.
    """
    heads = getattr(module, name, None)
    if not isinstance(heads, int) or heads < 1:
        raise UserError(f"{path}.{name}: expected the number of heads, found {heads!r}")
    return heads


def expect_linear(module: nn.Module, path: str, inputs: int | None, outputs: int | None) -> None:
    """Check that a module is a linear layer from ``inputs`` to ``outputs`` channels.

    Args:
        module: the module.
        path: its name in the model, for messages.
        inputs, outputs: the expected ``in_features`` and ``out_features``.

    Raises:
        UserError: it has other channels, or is not a linear layer.
    """
    found = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if found != (inputs, outputs) or None in found:
        given = f"{type(module).__name__} from {found[0]} to {found[1]}"
        raise UserError(f"{path}: expected a linear layer from {inputs} to {outputs} channels, found {given}")
