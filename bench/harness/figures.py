"""Figures of a result. Each function takes rows and returns a matplotlib figure, or None without rows to draw."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from bench.harness.fit import exponent, scaling_groups
from bench.harness.rows import Row, name_of
from pruneattn.plot import FAINT, INK, matplotlib_figure, plain_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = (
    "#1f5fa8",
    "#c2491d",
    "#2b8a5a",
    "#8e4fa8",
    "#b58a00",
    "#4aa3c7",
    "#7a7a7a",
    "#d0679d",
    "#5c4b3a",
    "#9aa832",
    "#111111",
    "#e9967a",
    "#00b3a4",
    "#6b6bd6",
)
_MARKERS = "osD^v"  # changes when the colors repeat, because there can be more providers than colors


def _timed(rows: Iterable[Row], *levels: str) -> list[Row]:
    return [row for row in rows if row["level"] in levels and row["status"] == "ok" and row["part"] is None]


def _by(rows: Iterable[Row], *columns: str) -> list[list[Row]]:
    def key(row: Row) -> tuple[str, ...]:
        return tuple(str(row[column]) for column in columns)

    return [list(group) for _, group in groupby(sorted(rows, key=key), key=key)]


def _who(row: Row) -> str:
    return row["provider"] if row["backend"] is None else f"{row['provider']}, {row['backend']}"


def _axes(groups: Sequence[list[Row]], width: float = 5.2, height: float = 3.9) -> tuple[Figure, list[Axes]]:
    """Make a figure with a panel for each group of rows, two per line, and return its axes."""
    columns, lines = min(2, len(groups)), (len(groups) + 1) // 2
    figure = matplotlib_figure()(figsize=(width * columns, height * lines), dpi=150, layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis in axes[len(groups) :]:
        axis.remove()
    for axis, group in zip(axes, groups):
        plain_axis(axis)
        row = group[0]
        axis.set_title(
            f"{row['subject']}, {row['dtype']}, batch {row['batch']}, {row['tokens']} tokens", fontsize=9, loc="left"
        )
    return figure, axes[: len(groups)]


def _styles(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """Color and marker of each provider, the same in all panels of a figure."""
    names = dict.fromkeys(_who(row) for row in rows)
    return {name: _style(i) for i, name in enumerate(names)}


def _style(number: int) -> dict[str, Any]:
    return {"color": _COLORS[number % len(_COLORS)], "marker": _MARKERS[number // len(_COLORS) % len(_MARKERS)]}


def _plain_numbers(axis: Axes) -> None:
    """Label a logarithmic axis with numbers instead of powers of ten."""
    for set_formatter in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        set_formatter("{x:g}")
    axis.tick_params(axis="y", which="both", labelsize=7)
    low, high = axis.get_ylim()
    if high / low > 30:
        axis.yaxis.set_minor_formatter("")


def realized_by_keep_rate(rows: Iterable[Row]) -> Figure | None:
    """Saving of wall-clock time relative to the saving of MACs."""
    rows = [row for row in _timed(rows, "model") if row["realised"] is not None]
    if not rows:
        return None
    styles = _styles(rows)
    groups = _by(rows, "subject", "dtype", "batch", "tokens")
    figure, axes = _axes(groups)
    for axis, group in zip(axes, groups):
        for line in _by(group, "provider", "backend"):
            line.sort(key=lambda row: row["keep_rate"])
            x, y = [row["keep_rate"] for row in line], [100 * row["realised"] for row in line]
            axis.plot(x, y, "-", **styles[_who(line[0])], ms=4, lw=1.4, label=_who(line[0]))
        axis.axhline(100, color=FAINT, lw=1, ls="--")
        axis.set_xticks(sorted({row["keep_rate"] for row in group}))
        axis.set_xlabel("keep-rate")
        axis.set_ylabel("realized saving (% of theory)")
        axis.legend(frameon=False, fontsize=7)
    return figure


def time_by_macs(rows: Iterable[Row]) -> Figure | None:
    """Time against computed MACs, with the line on which time is proportional to MACs, through the fastest unpruned
    provider.
    """
    rows = [row for row in _timed(rows, "model") if row["macs_computed"]]
    groups = [g for g in _by(rows, "subject", "dtype", "batch", "tokens") if any(row["keep_rate"] == 1 for row in g)]
    if not groups:
        return None
    styles = _styles(rows)
    figure, axes = _axes(groups, width=5.6, height=4.4)
    for axis, group in zip(axes, groups):
        dense = min((row for row in group if row["keep_rate"] == 1), key=lambda row: row["p50_ms"])
        most = max(row["macs_computed"] for row in group)
        slope = dense["p50_ms"] / dense["macs_computed"]
        axis.plot([0, most / 1e9], [0, slope * most], color=FAINT, lw=1, ls="--", label="time proportional to MACs")
        for points in _by(group, "provider", "backend"):
            x, y = [row["macs_computed"] / 1e9 for row in points], [row["p50_ms"] for row in points]
            axis.plot(x, y, ls="", **styles[_who(points[0])], ms=5, label=_who(points[0]))
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("computed GMACs per call")
        axis.set_ylabel("ms")
        axis.legend(frameon=False, fontsize=6.5)
    return figure


def ops_against_floor(rows: Iterable[Row]) -> Figure | None:
    """Time of each op relative to the lower bound of the roofline model."""
    rows = [row for row in _timed(rows, "op") if row["floor_ms"]]
    if not rows:
        return None
    groups = _by(rows, "subject")
    figure, axes = _axes(groups)
    for axis, group in zip(axes, groups):
        axis.set_title(group[0]["subject"], fontsize=9, loc="left")
        cases = _by(group, "dtype", "batch", "tokens")
        cases.sort(key=lambda case: (case[0]["dtype"], case[0]["batch"], case[0]["tokens"]))
        for who, style in _styles(group).items():
            points = [
                (i, row["p50_ms"] / row["floor_ms"]) for i, case in enumerate(cases) for row in case if _who(row) == who
            ]
            axis.plot(*zip(*points), "-", **style, ms=4, lw=1, label=who)
        axis.axhline(1, color=FAINT, lw=1, ls="--")
        axis.set_yscale("log")
        _plain_numbers(axis)
        halves = len({case[0]["dtype"] for case in cases}) > 1
        labels = [f"{c[0]['batch']}x{c[0]['tokens']}" + (f"\n{c[0]['dtype']}" if halves else "") for c in cases]
        axis.set_xticks(range(len(cases)), labels, fontsize=7)
        axis.set_ylabel("time / floor")
        axis.legend(frameon=False, fontsize=7)
    return figure


def clips_per_second(rows: Iterable[Row]) -> Figure | None:
    """Bars of all providers, the fastest first."""
    return _bars(rows, "clips_per_second", "clips per second", -1)


def memory(rows: Iterable[Row]) -> Figure | None:
    """Bars of the memory that a call adds."""
    return _bars(rows, "peak_memory_mib", "peak memory of a call (MiB)", 1)


def _bars(rows: Iterable[Row], column: str, label: str, order: int) -> Figure | None:
    rows = [row for row in _timed(rows, "model") if row[column] is not None]
    if not rows:
        return None
    groups = _by(rows, "subject", "dtype", "batch", "tokens")
    figure, axes = _axes(groups, width=6.2, height=0.9 + 0.19 * max(map(len, groups)))
    for axis, group in zip(axes, groups):
        group = sorted(group, key=lambda row: order * row[column])[::-1]
        colors = [_COLORS[0] if row["provider"] == "ours" else "#b9c3cd" for row in group]
        bars = axis.barh([name_of(row) for row in group], [row[column] for row in group], color=colors)
        axis.bar_label(bars, fmt="%.3g", fontsize=6.5, padding=2, color=INK)
        axis.tick_params(axis="y", labelsize=7)
        axis.margins(y=0.01)
        axis.set_xlabel(label)
    return figure


def scaling(rows: Iterable[Row]) -> Figure | None:
    """Time and memory by tokens and by batch on logarithmic axes, with the exponents in the legend."""
    rows, panels = list(rows), []
    for level, size in (("scaling by tokens", "tokens"), ("scaling by batch", "batch")):
        for column in ("p50_ms", "peak_memory_mib"):
            groups = [[row for row in g if (row[column] or 0) > 0] for g in scaling_groups(rows, level)]
            for subject in dict.fromkeys(g[0]["subject"] for g in groups if g):
                panels.append((size, column, [g for g in groups if g and g[0]["subject"] == subject]))
    return _draw_scaling(panels) if panels else None


def _draw_scaling(panels: Sequence[tuple[str, str, list[list[Row]]]]) -> Figure:
    figure, axes = _axes([groups[0] for _, _, groups in panels])
    for axis, (size, column, groups) in zip(axes, panels):
        axis.set_title(f"{groups[0][0]['subject']}, by {size}", fontsize=9, loc="left")
        for i, group in enumerate(groups):
            x, y = [row[size] for row in group], [row[column] for row in group]
            slope, error = exponent(x, y)
            fit = "" if slope is None else f": {slope:.2f} ± {error:.2f}"
            axis.plot(x, y, "-", **_style(i), ms=4, lw=1.2, label=name_of(group[0]) + fit)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        _plain_numbers(axis)
        axis.set_xticks(sorted({row[size] for group in groups for row in group}), minor=False)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.tick_params(axis="x", labelsize=7)
        axis.set_xlabel(size)
        axis.set_ylabel("ms" if column == "p50_ms" else "peak memory (MiB)")
        axis.legend(frameon=False, fontsize=7)
    return figure


#: Figures by the last part of their file names.
FIGURES: dict[str, Callable[[Iterable[Row]], Figure | None]] = {
    "realised": realized_by_keep_rate,
    "time-macs": time_by_macs,
    "ops-floor": ops_against_floor,
    "clips-per-second": clips_per_second,
    "memory": memory,
    "scaling": scaling,
}
