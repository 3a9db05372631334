"""The arguments of ``prune`` in the configuration of a Hugging Face model, which ``save_pretrained`` stores."""

from __future__ import annotations

from typing import Any

from torch import nn

from .block import AdaptedBlock, pruned_blocks

#: Name of the entry. checkpoints/huggingface.py reads and writes it too.
_ENTRY = "pruneattn"


def config_of(module: nn.Module | None) -> Any:
    """The configuration that ``save_pretrained`` of transformers stores with a model; None if there is none."""
    config = getattr(module, "config", None)
    return config if callable(getattr(config, "save_pretrained", None)) else None


def record(model: nn.Module) -> None:
    """Store the arguments with which :func:`pruneattn.prune` prunes a model in this way.

    Args:
        model: the model, or a module that contains several models.
    """
    blocks: dict[int, list[AdaptedBlock]] = {}
    for block in pruned_blocks(model):
        blocks.setdefault(id(block._pruneattn.config), []).append(block)
    for own in blocks.values():
        settings = [block._pruneattn for block in own]
        config, score = settings[0].config, settings[0].score
        if config is not None and score is not None:
            rates, numbers = [one.keep_rate for one in settings], [one.number for one in settings]
            # Older versions of pruneattn read only the name blocks.
            setattr(config, _ENTRY, {"keep_rate": rates, "blocks": numbers, "score": score})


def forget(module: nn.Module | None) -> None:
    """Remove the entry from the configuration of a module, if it has one."""
    config = config_of(module)
    if config is not None:
        vars(config).pop(_ENTRY, None)
