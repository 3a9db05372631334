"""Whether a block is made of the parts that pruning knows, put together as it believes."""

import copy
import inspect
import itertools

import torch

from ..errors import UserError
from ..models.scores import make_pruning
from .block import BlockPruning, start_pruning


def check_block(block, path, view, extra_tokens):
    """Raise a UserError unless pruning understands the block, which stays as it is.

    Names and shapes are looked at first, for a message that says what is in the way. That they are put together in the
    order of a ViT's block is seen by running a copy of the block, with random weights, beside its pruning form that
    keeps every patch.
    """
    view.check(block, path)
    names = list(inspect.signature(type(block).forward).parameters.values())[2:]  # after the block and its tokens
    unknown = [p.name for p in names if p.kind is not p.VAR_KEYWORD and p.name not in view.arguments]
    if unknown:
        raise UserError(f"{path} takes {', '.join(unknown)} beside its tokens, which pruning cannot follow")
    try:
        error = _difference(block, path, view, extra_tokens)
    except UserError:
        raise
    except Exception as failure:  # whatever a block of others may raise
        raise UserError(f"{path}: a copy of it could not be run alone to see what it does: {failure}") from failure
    # Rounding is far below this in every dtype, other arithmetic far above it.
    if not error < 0.03:
        raise UserError(
            f"{path} has the parts of a ViT's block, but does something else with them (its output differs by "
            f"{error:.0%} from that of attention and MLP, each after its norm and added to its input)"
        )


@torch.no_grad()
def _difference(block, path, view, extra_tokens):
    """Relative difference of what the block and its pruning form add to their input."""
    block = copy.deepcopy(block).eval()
    for module in block.modules():  # hooks are for the user's tokens, not for random ones
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    if any(parameter.is_meta for parameter in block.parameters()):
        block.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)  # leaves the global one alone

    def random(*shape):
        return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)

    for parameter in filter(torch.is_floating_point, block.parameters()):
        fan_in = parameter.shape[-1] if parameter.dim() > 1 else 1
        parameter.copy_(random(*parameter.shape) / fan_in**0.5)
    like = next(filter(torch.is_floating_point, block.parameters()))
    patches = 6
    x = random(2, extra_tokens + patches, view(block).dim).to(like)  # [B, N, C]
    expected = _tokens(block(x)) - x
    start_pruning(block, BlockPruning(path, view, extra_tokens, None, 1.0))
    errors = []
    for score in ("column_mean", "cls"):  # one projects all rows at once, the other part by part
        block._pruneattn.pruning = make_pruning(score)
        given = _tokens(block.forward_pruned(x, patches)) - x
        errors.append(((given - expected).float().norm() / expected.float().norm()).item())
    return max(errors)


def _tokens(output):
    return output[0] if isinstance(output, tuple) else output


def expect_parts(module, path, required, optional=()):
    """Raise unless a module has all required parts (modules, parameters, buffers) and none but these and optional."""
    children = itertools.chain(module.named_children(), module._parameters.items(), module._buffers.items())
    found = [name for name, part in children if part is not None]
    missing = [name for name in required if name not in found]
    unknown = [name for name in found if name not in (*required, *optional)]
    kind = type(module).__name__
    if missing:
        there = ", ".join(found)
        raise UserError(f"{path} ({kind}) has no {missing[0]!r}: expected {', '.join(required)}, found {there}")
    if unknown:
        raise UserError(f"{path} ({kind}) has {unknown[0]!r}, a part that pruning does not know what to do with")


def expect_heads(module, path, name):
    """The number of heads that a module says it has."""
    heads = getattr(module, name, None)
    if not isinstance(heads, int) or heads < 1:
        raise UserError(f"{path}.{name}: expected the number of heads, found {heads!r}")
    return heads


def expect_linear(module, path, inputs, outputs):
    """Raise unless a module goes from so many channels to so many."""
    found = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if found != (inputs, outputs):
        given = f"{type(module).__name__} from {found[0]} to {found[1]}"
        raise UserError(f"{path}: expected a linear layer from {inputs} to {outputs} channels, found {given}")
