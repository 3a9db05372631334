"""Growth of time and memory with the size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby

from bench.harness.rows import Row, name_of


def exponent(sizes: Sequence[float], values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Fit ``values = a * sizes**b`` by least squares of the logarithms.

    Returns:
        The exponent b and its standard error. Both are None for fewer than three different sizes, and for values that
        have no logarithm.
    """
    if len(set(sizes)) < 3 or any(value is None or value <= 0 for value in values):
        return None, None
    x, y = ([math.log(number) for number in numbers if number is not None] for numbers in (sizes, values))
    count, mean_x, mean_y = len(x), sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / spread
    rest = sum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(x, y))
    return slope, math.sqrt(rest / (count - 2) / spread)


def scaling_groups(rows: Iterable[Row], level: str) -> list[list[Row]]:
    """Group the timed rows of a level that differ in their size only; each group is sorted by size."""
    size, other = ("tokens", "batch") if level == "scaling by tokens" else ("batch", "tokens")

    def key(row: Row) -> tuple:
        return row["subject"], row["device"], row["dtype"], row[other], name_of(row)

    timed = [row for row in rows if row["level"] == level and row["status"] == "ok"]
    groups = [list(group) for _, group in groupby(sorted(timed, key=key), key=key)]
    return [sorted(group, key=lambda row: row[size]) for group in groups]
