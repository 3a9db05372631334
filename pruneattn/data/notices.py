"""Warnings about sounds, each kind once."""

from __future__ import annotations

import mmap
import warnings
from typing import Literal, get_args

Kind = Literal["length", "scale", "phase"]

# Memory that forked processes share, so that several processes that decode do not repeat a warning.
_said = mmap.mmap(-1, len(get_args(Kind)))


def say_once(kind: Kind, message: str) -> None:
    """Warn, unless this process or one that shares its start has warned of this kind before."""
    place = get_args(Kind).index(kind)
    if not _said[place]:
        _said[place] = 1
        warnings.warn(message, stacklevel=2)


def forget() -> None:
    """Report every kind again."""
    _said[:] = bytes(len(_said))
