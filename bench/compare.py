"""Two result files: what changed beyond the noise."""

import math
from typing import NamedTuple

from bench.rows import case_name, key_of, name_of
from pruneattn.errors import UserError

#: Smallest change of a median that counts, whatever the spreads say.
LEAST_CHANGE = 0.05


class Change(NamedTuple):
    """A row of both files whose times differ beyond the noise: ``ratio`` is the new median by the old one."""

    row: dict
    ratio: float
    noise: float


class Comparison(NamedTuple):
    """``changes``; ``statuses``: rows (old, new) of which one has no time; rows of one file alone; how many had both."""

    changes: list
    statuses: list
    only_old: list
    only_new: list
    compared: int


def compare(old, new, different_devices=False):
    """Compare two results as `rows.read_result` gives them.

    A time has changed where the 20th to 80th percentiles of the two do not overlap, and the medians differ by more than
    the spreads explain: by more than their root sum of squares (each half of its range, as a share of the median), and
    by `LEAST_CHANGE`.

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
    changes, statuses, compared = [], [], 0
    for key in before.keys() & after.keys():
        a, b = before[key], after[key]
        if a["status"] != b["status"]:
            statuses.append((a, b))
        elif a["p50_ms"]:
            compared += 1
            ratio, noise = b["p50_ms"] / a["p50_ms"], math.hypot(_spread(a), _spread(b))
            apart = a["p80_ms"] < b["p20_ms"] or b["p80_ms"] < a["p20_ms"]
            if apart and abs(math.log(ratio)) > max(math.log1p(LEAST_CHANGE), math.log1p(noise)):
                changes.append(Change(b, ratio, noise))
    changes.sort(key=lambda change: -abs(math.log(change.ratio)))
    return Comparison(
        changes,
        statuses,
        [row for key, row in before.items() if key not in after],
        [row for key, row in after.items() if key not in before],
        compared,
    )


def comparison_text(result):
    """A `Comparison` as Markdown lines."""
    lines = [f"{result.compared} times compared: {len(result.changes) or 'none'} changed beyond the noise."]
    for change in result.changes:
        percent = 100 * (change.ratio - 1)
        lines.append(f"- {_where(change.row)}: {percent:+.1f} % (noise {100 * change.noise:.1f} %)")
    for a, b in result.statuses:
        lines.append(f"- {_where(b)}: was {a['status']}, is {b['status']}")
    for title, rows in (("Only in the old file", result.only_old), ("Only in the new file", result.only_new)):
        lines += [f"\n{title}: {len(rows)}", *(f"- {_where(row)}" for row in rows)] if rows else []
    return lines


def _where(row):
    return f"{row['level']}, {case_name(row)}: {name_of(row)}"


def _spread(row):
    return (row["p80_ms"] - row["p20_ms"]) / 2 / row["p50_ms"]
