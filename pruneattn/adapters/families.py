"""The known families of models, and the search for the blocks of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from ..errors import UserError
from ..models.vit import unwrapped
from . import huggingface, timm, whisper
from .trunk import Trunk

_Find = Callable[[Any], Trunk | None]
_AnyFind = TypeVar("_AnyFind", bound=_Find)

_families: list[_Find] = [timm.find, whisper.find, huggingface.find]


def register_family(find: _AnyFind) -> _AnyFind:
    """Add a family of models to :func:`prune`, :func:`unprune` and :func:`pruneattn.optimize_for_inference`.

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


def find_trunk(caller: str, model: nn.Module) -> Trunk:
    """The part of a model that contains the blocks, described by the first family that recognizes it.

    Args:
        caller: name of the function that needs it, for the message.
        model: the model. It can be wrapped by ``torch.compile`` or by PEFT.

    Raises:
        UserError: no family recognizes the model, or its family rejects it.
    """
    for candidate in candidates(model):
        for find in _families:
            trunk = find(candidate)
            if trunk is not None:
                return trunk if trunk.module is not None else replace(trunk, module=candidate)
    raise UserError(
        f"{caller}: {type(model).__name__} has no known list of blocks: looked for 'blocks' (timm), 'layers' "
        "and 'encoder.layer' (Hugging Face) in it and in its 'base_model'. Pass the model itself, not a wrapper around "
        "it, or add its family with pruneattn.adapters.register_family"
    )


def candidates(model: Any) -> Iterator[Any]:
    """The modules in which the blocks may be: the model, without its wrapper, and its ``base_model``."""
    model = unwrapped(model)
    inner = getattr(model, "get_base_model", None)  # PEFT
    model = inner() if callable(inner) else model
    yield model
    # Hugging Face's models with a head have their trunk in base_model. The base_model of a trunk is the trunk itself.
    base = getattr(model, "base_model", None)
    if base is not model:
        yield base
