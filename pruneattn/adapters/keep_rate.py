"""Keep-rates of models that prune: models of ``create_model``, and models changed by ``prune``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from ..errors import UserError
from ..models.blocks import spread_keep_rate
from ..models.vit import PrunedViT, unwrapped
from .block import BlockSettings, pruned_blocks
from .record import record

_Model = TypeVar("_Model", bound=nn.Module)


def set_keep_rate(model: nn.Module, keep_rate: float | Sequence[float]) -> None:
    """Set the keep-rate of a model of ``create_model``, or of a model that :func:`prune` changed.

    The record of the pruning in the configuration of a Hugging Face model follows.

    Args:
        model: the model; it can be wrapped by ``torch.compile``.
        keep_rate: fraction of the patches that each pruning block keeps, in (0, 1]: one number, or one per pruning
            block.

    Raises:
        UserError: the keep-rate is invalid, or the model is not pruned. The model is not changed.
    """
    own = unwrapped(model)
    if isinstance(own, PrunedViT):
        own.set_keep_rate(keep_rate)
    else:
        _set_rates(model, _settings("set_keep_rate", model), keep_rate)


@contextmanager
def at_keep_rate(model: _Model, keep_rate: float | Sequence[float]) -> Iterator[_Model]:
    """Context manager that runs a model at another keep-rate. On exit it restores the previous keep-rates, also after
    an exception.

    Args:
        model: model of ``create_model``, or a model that :func:`prune` changed; it can be wrapped by
            ``torch.compile``.
        keep_rate: fraction of the patches that each pruning block keeps, in (0, 1]: one number, or one per pruning
            block.

    Yields:
        The model.

    Raises:
        UserError: the keep-rate is invalid, or the model is not pruned. The model is not changed.

    Examples:
        >>> with pruneattn.at_keep_rate(model, 0.5):
        ...     logits = model(fbank)
    """
    own = unwrapped(model)
    if isinstance(own, PrunedViT):
        previous = own.keep_rates
        own.set_keep_rate(keep_rate)
        try:
            yield model
        finally:
            own.keep_rates = previous
        return
    settings = _settings("at_keep_rate", model)
    rates = [own.keep_rate for own in settings]
    _set_rates(model, settings, keep_rate)
    try:
        yield model
    finally:
        # If prune was called inside the block, these settings no longer belong to the model, and its new rates remain.
        _set_rates(model, settings, rates)


def _settings(caller: str, model: nn.Module) -> list[BlockSettings]:
    settings = [block._pruneattn for block in pruned_blocks(model)]
    if not settings:
        raise UserError(f"{caller}: no block of this {type(model).__name__} prunes: call pruneattn.prune first")
    return settings


def _set_rates(model: nn.Module, settings: list[BlockSettings], keep_rate: float | Sequence[float]) -> None:
    for own, rate in zip(settings, spread_keep_rate(keep_rate, len(settings)), strict=True):
        own.keep_rate = rate
    record(model)
