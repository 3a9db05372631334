"""Means over clips with their standard errors, from sums alone."""

import math
from collections import defaultdict


class Means:
    """Means of any number of quantities over the clips of a stream; memory is that of three sums for each."""

    def __init__(self):
        self._sums = defaultdict(lambda: [0, 0.0, 0.0])  # count, sum, sum of squares

    def add(self, values, key):
        """Add one value per clip, a tensor ``[B]``, to the quantity ``key``; what is not finite is left out."""
        values = values.detach().double().cpu()
        values = values[values.isfinite()]
        sums = self._sums[key]
        sums[0] += len(values)
        sums[1] += float(values.sum())
        sums[2] += float(values.square().sum())

    def of(self, key):
        """``(mean, standard error of the mean, clips)``; NaN for what the clips do not tell."""
        count, total, squares = self._sums[key]
        mean = total / count if count else math.nan
        variance = max(0.0, squares - count * mean**2) / (count - 1) if count > 1 else math.nan
        return mean, math.sqrt(variance / count) if count else math.nan, count
