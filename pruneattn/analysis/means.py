"""Means over clips with their standard errors, from running sums."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable

import torch


class Means:
    """Means of any number of quantities over a stream of clips, in the memory of three sums per quantity."""

    def __init__(self) -> None:
        self._sums: defaultdict[Hashable, tuple[int, float, float]] = defaultdict(lambda: (0, 0.0, 0.0))

    def add(self, values: torch.Tensor, key: Hashable) -> None:
        """Add one value per clip, a tensor ``[B]``, to the quantity ``key``. Values that are not finite are omitted."""
        values = values.detach().double().cpu()
        values = values[values.isfinite()]
        count, total, squares = self._sums[key]
        self._sums[key] = (count + len(values), total + float(values.sum()), squares + float(values.square().sum()))

    def of(self, key: Hashable) -> tuple[float, float, int]:
        """``(mean, standard error of the mean, clips)``; NaN if there are too few clips."""
        count, total, squares = self._sums[key]
        mean = total / count if count else math.nan
        variance = max(0.0, squares - count * mean**2) / (count - 1) if count > 1 else math.nan
        return mean, math.sqrt(variance / count) if count else math.nan, count
