"""Two result files: what changed beyond the noise."""

import math
from collections import defaultdict
from statistics import median
from typing import NamedTuple

from bench.harness.rows import CASE, case_name, key_of, name_of
from pruneattn.errors import UserError

#: Smallest change of a median that counts, whatever the spreads say.
LEAST_CHANGE = 0.05
#: How many spreads a change has to be: rounds that follow one another are more alike than two runs are.
SPREADS = 3


class Change(NamedTuple):
    """A row of both files whose times differ beyond the noise, by ``ratio``: new by old; see `compare`."""

    row: dict
    ratio: float
    noise: float


class Comparison(NamedTuple):
    """``changes``; ``shifts``: rows, one of each case, and the ratio by which its times differ, where that is much;
    ``statuses``: rows (old, new) of which one has no time; rows of one file alone; how many had both."""

    changes: list
    shifts: list
    statuses: list
    only_old: list
    only_new: list
    compared: int


def compare(old, new, different_devices=False):
    """Compare two results as `rows.read_result` gives them.

    The providers of a case took turns, so that a machine that was slower then was slower for all of them. A time has
    changed where it did so by itself and also against the case's other providers (their median ratio; that of all, where
    there are only ours), in the same direction. The smaller of the two changes has to be more than `LEAST_CHANGE`, and
    more than `SPREADS` times the root sum of squares of the two spreads. A spread is half of the range from the 20th to
    the 80th percentile, as a share of the median, and no less than the median of those of its file, since a few rounds
    can be alike by chance.

    Args:
        old, new: ``(machine, rows)``.
        different_devices: compare results of different devices all the same.

    Returns:
        `Comparison`.

    Raises:
        UserError: the devices or their threads are not the same, and that was not wanted.
    """
    names = [f"{machine['device_name']}, {machine['threads']} threads" for machine, _ in (old, new)]
    if names[0] != names[1] and not different_devices:
        raise UserError(
            f"the results are of different devices ({names[0]}; {names[1]}): their times differ for that reason; "
            "--different-devices compares them all the same"
        )
    before, after = ({key_of(row): row for row in rows} for _, rows in (old, new))
    statuses, cases = [], defaultdict(list)
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
            ratio = _agreed(b["p50_ms"] / a["p50_ms"], b["p50_ms"] / a["p50_ms"] / shift)
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


def _shift(pairs):
    ratio = lambda pair: pair[1]["p50_ms"] / pair[0]["p50_ms"]
    others = [ratio(pair) for pair in pairs if pair[0]["provider"] != "ours"]
    return median(others or map(ratio, pairs))


def _agreed(*ratios):
    """What both ratios say: the one nearer to 1, or 1 if one is a gain and the other a loss."""
    if math.prod(map(math.log, ratios)) <= 0:
        return 1.0
    return min(ratios, key=lambda ratio: abs(math.log(ratio)))


def comparison_text(result):
    """A `Comparison` as Markdown lines."""
    changed = len(result.changes) or "none"
    lines = [f"{result.compared} times compared with those beside them: {changed} changed beyond the noise."]
    for change in result.changes:
        lines.append(f"- {_where(change.row)}: {_percent(change.ratio)} (noise {100 * change.noise:.1f} %)")
    if result.shifts:
        lines.append("\nAll providers of these cases alike, so the machine, or what all share:")
    for row, ratio in result.shifts:
        lines.append(f"- {row['level']}, {case_name(row)}: {_percent(ratio)}")
    for a, b in result.statuses:
        lines.append(f"- {_where(b)}: was {a['status']}, is {b['status']}")
    for title, rows in (("Only in the old file", result.only_old), ("Only in the new file", result.only_new)):
        lines += [f"\n{title}: {len(rows)}", *(f"- {_where(row)}" for row in rows)] if rows else []
    return lines


def _percent(ratio):
    return f"{100 * (ratio - 1):+.1f} %"


def _where(row):
    return f"{row['level']}, {case_name(row)}: {name_of(row)}"


def _spread(row):
    return (row["p80_ms"] - row["p20_ms"]) / 2 / row["p50_ms"]
