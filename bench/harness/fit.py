"""How time and memory grow with the size."""

import math
from itertools import groupby

from bench.harness.rows import name_of


def exponent(sizes, values):
    """The exponent b of ``values = a * sizes**b`` by least squares in the logarithms, and its standard error.

    None for both with fewer than three different sizes, or with values that have no logarithm.
    """
    if len(set(sizes)) < 3 or any(value is None or value <= 0 for value in values):
        return None, None
    x, y = ([math.log(number) for number in numbers] for numbers in (sizes, values))
    count, mean_x, mean_y = len(x), sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / spread
    rest = sum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(x, y))
    return slope, math.sqrt(rest / (count - 2) / spread)


def scaling_groups(rows, level):
    """The timed rows of a level that differ in their size alone, each list by size."""
    size, other = ("tokens", "batch") if level == "scaling by tokens" else ("batch", "tokens")
    key = lambda row: (row["subject"], row["device"], row["dtype"], row[other], name_of(row))
    timed = [row for row in rows if row["level"] == level and row["status"] == "ok"]
    groups = [list(group) for _, group in groupby(sorted(timed, key=key), key=key)]
    return [sorted(group, key=lambda row: row[size]) for group in groups]
