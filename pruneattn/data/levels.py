"""The levels of a sound: samples that are not numbers, a wrong scale, channels that cancel."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from .notices import say_once

_LOUDEST = 1e9  # the squares of much larger samples overflow float32
_INTEGER_SCALE = 64.0  # full scale is 1, and a mix without a limiter stays far below this
_SILENT = 1e-4  # share of the channels' energy (-40 dB) below which their mean is silence


class Levels:
    """Levels of the blocks of a sound.

    Attributes:
        read: number of samples in a channel.
    """

    def __init__(self) -> None:
        self.read = self._bad = 0
        self._peak = self._energy = self._mean_energy = 0.0

    def add(self, block: npt.NDArray[np.float32], mono: npt.NDArray[np.float32], subtype: str) -> None:
        """Add a block ``[L, channels]`` and its mean ``[L]``."""
        self.read += len(mono)
        peak = float(np.abs(mono).max())
        if not peak <= _LOUDEST:
            self._bad += len(mono) - int(np.count_nonzero(np.abs(mono) <= _LOUDEST))
        elif subtype in ("FLOAT", "DOUBLE"):
            self._peak = max(self._peak, peak)
        if block.shape[1] > 1:
            self._energy += _energy(block) / block.shape[1]
            self._mean_energy += _energy(mono)

    def check(self, path: str | os.PathLike[str]) -> None:
        """Raise a ``UserError`` for samples that are not numbers, and warn of other levels that are surely wrong."""
        if self._bad:
            raise UserError(
                f"{path}: {self._bad} samples are NaN, infinite or beyond +-{_LOUDEST:.0e}; export the clip again"
            )
        if self._peak > _INTEGER_SCALE:
            say_once(
                "scale",
                f"{path}: its float samples reach {self._peak:.4g}, but full scale is 1: they seem to have the scale "
                "of integers, which changes the labels; divide them when you export (this is reported once)",
            )
        if self._energy > 0 and self._mean_energy < _SILENT * self._energy:
            say_once(
                "phase",
                f"{path}: its channels are in opposite phase, and their mean, which is labeled, is nearly silent; "
                "invert a channel or export only one (this is reported once)",
            )


def _energy(samples: npt.NDArray[Any]) -> float:
    flat = samples.reshape(-1)
    return float(np.dot(flat, flat))
