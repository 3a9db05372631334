"""Comparison of two result files: changes beyond the noise."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from statistics import median
from typing import Any, NamedTuple

from bench.harness.rows import CASE, Row, case_name, key_of, name_of
from pruneattn.errors import UserError

#: Smallest relative change of a median that counts, whatever the spreads are.
LEAST_CHANGE = 0.05
#: A change must exceed this many spreads, because the rounds of one run differ less than two runs do.
SPREADS = 3

Pair = tuple[Row, Row]


class Change(NamedTuple):
    """A row that both files have and whose time changed beyond the noise; see `compare`."""

    row: Row  # of the new file
    ratio: float  # new time / old time
    noise: float


class Comparison(NamedTuple):
    """Result of `compare`.

    Attributes:
        changes: `Change` of each row that changed, the largest first.
        shifts: one row of each case in which all times changed, with the ratio.
        statuses: pairs (old row, new row) whose statuses differ.
        only_old: rows without a counterpart in the new file.
        only_new: rows without a counterpart in the old file.
        compared: number of rows with a time in both files.
    """

    changes: list[Change]
    shifts: list[tuple[Row, float]]
    statuses: list[Pair]
    only_old: list[Row]
    only_new: list[Row]
    compared: int


def compare(
    old: tuple[dict[str, Any], list[Row]], new: tuple[dict[str, Any], list[Row]], different_devices: bool = False
) -> Comparison:
    """Compare two results as `rows.read_result` returns them.

    The rounds of all providers of a case are interleaved, so a slower machine affects all of them. A time has changed
    if both the time itself and its ratio to the other providers of the case changed in the same direction. The second
    ratio uses the median of the other libraries' ratios, or of all ratios if the case has only our providers. The
    smaller of the two changes must exceed `LEAST_CHANGE`, and `SPREADS` times the root sum of squares of the two
    spreads. The spread of a row is half of the range from the 20th to the 80th percentile, divided by the median. It is
    at least the median spread of its file, because a few rounds can be equal by chance.

    Args:
        old: ``(machine, rows)`` of the old result.
        new: ``(machine, rows)`` of the new result.
        different_devices: also compare results of different devices.

    Raises:
        UserError: the results are of different devices or numbers of threads, and `different_devices` is False.
    """
    names = [f"{machine['device_name']}, {machine['threads']} threads" for machine, _ in (old, new)]
    if names[0] != names[1] and not different_devices:
        raise UserError(
            f"the results are from different devices ({names[0]}; {names[1]}), so their times differ; "
            "use --different-devices to compare them anyway"
        )
    before, after = ({key_of(row): row for row in rows} for _, rows in (old, new))
    statuses: list[Pair] = []
    cases: defaultdict[tuple, list[Pair]] = defaultdict(list)
    for key in before.keys() & after.keys():
        a, b = before[key], after[key]
        if a["status"] != b["status"]:
            statuses.append((a, b))
        elif a["p50_ms"]:
            cases[key[: len(CASE)]].append((a, b))
    usual = [median(_spread(row) for row in rows if row["p50_ms"]) for _, rows in (old, new)]
    changes, shifts = [], []
    for pairs in cases.values():
        shift = _shift(pairs)
        if abs(math.log(shift)) > math.log1p(LEAST_CHANGE):
            shifts.append((pairs[0][1], shift))
        for a, b in pairs:
            ratio = _smaller_change(b["p50_ms"] / a["p50_ms"], b["p50_ms"] / a["p50_ms"] / shift)
            noise = math.hypot(*(max(_spread(row), least) for row, least in zip((a, b), usual)))
            if abs(math.log(ratio)) > math.log1p(max(LEAST_CHANGE, SPREADS * noise)):
                changes.append(Change(b, ratio, noise))
    changes.sort(key=lambda change: -abs(math.log(change.ratio)))
    shifts.sort(key=lambda shift: -abs(math.log(shift[1])))
    return Comparison(
        changes,
        shifts,
        statuses,
        [row for key, row in before.items() if key not in after],
        [row for key, row in after.items() if key not in before],
        sum(map(len, cases.values())),
    )


def _shift(pairs: Iterable[Pair]) -> float:
    """Ratio by which the times of all providers of a case changed."""
    ratios = [(old["provider"], new["p50_ms"] / old["p50_ms"]) for old, new in pairs]
    others = [ratio for provider, ratio in ratios if provider != "ours"]
    return median(others or [ratio for _, ratio in ratios])


def _smaller_change(*ratios: float) -> float:
    """The ratio nearest to 1; 1 if one ratio is a gain and the other a loss."""
    if math.prod(map(math.log, ratios)) <= 0:
        return 1.0
    return min(ratios, key=lambda ratio: abs(math.log(ratio)))


def comparison_text(result: Comparison) -> list[str]:
    """Markdown lines of a `Comparison`."""
    changed = len(result.changes) or "none"
    lines = [f"{result.compared} times compared within their cases: {changed} changed beyond the noise."]
    for change in result.changes:
        lines.append(f"- {_where(change.row)}: {_percent(change.ratio)} (noise {100 * change.noise:.1f} %)")
    if result.shifts:
        lines.append("\nAll providers of these cases changed, because of the machine or of something that they share:")
    for row, ratio in result.shifts:
        lines.append(f"- {row['level']}, {case_name(row)}: {_percent(ratio)}")
    for a, b in result.statuses:
        lines.append(f"- {_where(b)}: was {a['status']}, is {b['status']}")
    for title, rows in (("Only in the old file", result.only_old), ("Only in the new file", result.only_new)):
        lines += [f"\n{title}: {len(rows)}", *(f"- {_where(row)}" for row in rows)] if rows else []
    return lines


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %"


def _where(row: Row) -> str:
    return f"{row['level']}, {case_name(row)}: {name_of(row)}"


def _spread(row: Row) -> float:
    return (row["p80_ms"] - row["p20_ms"]) / 2 / row["p50_ms"]
