"""Multiply-accumulates and time of one clip by number of patches and keep-rate (paper, Table II)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..constants import PATCH, VERSION
from ..errors import UserError
from ..files import write_json
from ..models import create_model
from ..models.macs import count_macs
from ..models.patches import Stride, check_stride, stride_text
from ..ops.backend import ENVIRONMENT, ISA_ENVIRONMENT
from ..plot import FAINT, INK, KeepRate, matplotlib_figure, plain_axis
from ..report import Column, Row, gmacs_text, markdown_lines
from ..runtime.timing import Speed, measure_speed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: The paper's Table II for ViT-B with one CLS token: frames -> keep-rate -> printed GMACs of one clip.
PRINTED_GMACS = {
    128: {1.0: 5.6, 0.9: 4.9, 0.8: 4.3, 0.7: 3.7, 0.6: 3.3, 0.5: 2.8, 0.4: 2.5},
    512: {1.0: 23.1, 0.9: 20.0, 0.8: 17.3, 0.7: 15.0, 0.6: 13.1, 0.5: 11.4, 0.4: 10.0},
    1024: {1.0: 48.6, 0.9: 41.8, 0.8: 36.0, 0.7: 31.1, 0.6: 27.1, 0.5: 23.7, 0.4: 20.8},
}
_PRINTED_MODELS = ("audiomae_base", "ast_base")
_STYLES = (  # Okabe-Ito colors, each with its own marker
    ("#0072b2", "o"),
    ("#d55e00", "s"),
    ("#009e73", "^"),
    ("#cc79a7", "D"),
    ("#56b4e9", "v"),
    ("#e69f00", "P"),
)


def count_rows(name: str, frames: int, keep_rates: Iterable[float], stride: Stride = PATCH) -> list[Row]:
    """Count the multiply-accumulates of a model.

    Args:
        name: name of a model, see ``list_models``.
        frames: frames of its input.
        keep_rates: numbers in (0, 1], the same in all pruning blocks.
        stride: mel bins and frames from one patch to the next: one number, or ``(frequency, time)``.

    Returns:
        One dict per keep-rate: ``stride`` as text (only if it is not 16), ``gmacs_printed`` (the paper's Table II; None
        if the table does not have this cell),
        ``gmacs_paper`` (the paper's count), ``difference`` of the two, ``gmacs_computed`` (the computed matrix
        products, with a head of 527 classes), ``theory`` (fraction of the unpruned work that is saved, by the paper's
        count).

    Raises:
        UserError: there is no such model, or frames, keep-rates or stride are invalid.
    """
    with torch.device("meta"):  # without memory for weights
        model = create_model(name, frames=frames, stride=stride)
    dense = count_macs(model, 1.0).paper
    usual = model.stride == (PATCH, PATCH)
    printed = PRINTED_GMACS.get(frames, {}) if name in _PRINTED_MODELS and usual else {}
    rows = []
    for keep_rate in keep_rates:
        macs = count_macs(model, keep_rate)
        cell = printed.get(keep_rate)
        rows.append(
            {
                "model": name,
                "frames": frames,
                **({} if usual else {"stride": stride_text(model.stride)}),
                "patches": model.num_patches,
                "keep_rate": keep_rate,
                "gmacs_printed": cell,
                "gmacs_paper": macs.paper / 1e9,
                "difference": None if cell is None else macs.paper / 1e9 - cell,
                "gmacs_computed": macs.computed / 1e9,
                "theory": 1 - macs.paper / dense,
            }
        )
    return rows


def speed_rows(rows: Iterable[Row], speed: Speed, options: Mapping[str, Any]) -> list[Row]:
    """Add the measured speed and the ``cell_options`` of its measurement to the rows of ``count_rows``."""
    how = {name: value for name, value in options.items() if name not in ("model", "frames", "stride", "keep_rates")}
    return [
        {
            **row,
            **speed.spread(row["keep_rate"]),
            **speed.row(row["keep_rate"], row["theory"]),
            "dense": speed.dense,
            **how,
        }
        for row in rows
    ]


def cell_options(
    name: str,
    frames: int,
    keep_rates: Iterable[float],
    device_name: str,
    *,
    batch_size: int,
    amp: str,
    rounds: int,
    compiled: bool,
    stride: Stride = PATCH,
) -> dict[str, Any]:
    """Everything that the time of a model depends on, as plain values."""
    both = check_stride(stride)
    return {
        "model": name,
        "frames": frames,
        # The usual stride is left out: timings of earlier versions do not have it.
        **({} if both == (PATCH, PATCH) else {"stride": list(both)}),
        "keep_rates": list(keep_rates),
        "batch_size": batch_size,
        "amp": amp,
        "rounds": rounds,
        "compiled": compiled,
        "device": device_name,
        "torch": torch.__version__,
        "pruneattn": VERSION,
        "backend": os.environ.get(ENVIRONMENT, "best"),
        "cpu_isa": os.environ.get(ISA_ENVIRONMENT, "best"),
    }


def time_cell(options: Mapping[str, Any], device: torch.device) -> Speed:
    """Measure the model of ``cell_options``, with random weights and random clips."""
    stride = options.get("stride", PATCH)
    model = create_model(options["model"], frames=options["frames"], stride=stride).to(device).eval()
    how = {name: options[name] for name in ("batch_size", "amp", "rounds", "compiled")}
    return measure_speed(model, options["keep_rates"], device, **how)


class Timings:
    """Measured times in a JSON file, by their ``cell_options``: a stopped run resumes, and a longer table extends it.

    Args:
        path: file, which the first ``add`` creates.

    Raises:
        UserError: the file exists and has other content.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: list[tuple[dict[str, Any], Speed]] = []
        if not path.exists():
            return
        try:
            for entry in json.loads(path.read_text(encoding="utf-8")):
                seconds: dict[KeepRate, Any] = {
                    float(keep_rate): variants for keep_rate, variants in entry["seconds"].items()
                }
                self._entries.append((entry["options"], Speed(seconds)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{path} is not a timings.json of pruneattn analyze table2 ({error}): delete it, or use another "
                "--output"
            ) from None

    def find(self, options: Mapping[str, Any]) -> Speed | None:
        """Speed that was measured with these ``cell_options``; None if there is none."""
        return next((speed for known, speed in self._entries if known == options), None)

    def add(self, options: dict[str, Any], speed: Speed) -> None:
        """Add a speed, and write the file."""
        self._entries.append((options, speed))
        write_json(self.path, [{"options": options, "seconds": speed.seconds} for options, speed in self._entries])


def table_lines(rows: Sequence[Row]) -> list[str]:
    """The rows as a Markdown table, a list of lines."""
    columns: list[Column] = [
        ("model", "model", str),
        ("patches", "patches", str),
        ("keep-rate", "keep_rate", "{:g}".format),
        ("printed", "gmacs_printed", "{:.1f}".format),
        ("GMACs paper", "gmacs_paper", gmacs_text),
        ("difference", "difference", "{:+.2f}".format),
        ("GMACs computed", "gmacs_computed", gmacs_text),
    ]
    if "saving" in rows[0]:
        columns += [
            ("ms/clip", "ms_per_clip", "{:.2f}".format),
            ("p20", "ms_per_clip_p20", "{:.2f}".format),
            ("p80", "ms_per_clip_p80", "{:.2f}".format),
            ("saving", "saving", "{:.1%}".format),
        ]
    columns.append(("theory", "theory", "{:.1%}".format))
    if "saving" in rows[0]:
        columns.append(("realized", "realised", "{:.0%}".format))
    return markdown_lines(columns, rows)


def plot_table2(rows: Sequence[Row]) -> Figure:
    """Draw a row of panels for each model: GMACs by keep-rate, and if time was measured, saved time over saved MACs.

    Args:
        rows: rows of ``count_rows`` or ``speed_rows``.

    Returns:
        matplotlib ``Figure``.
    """
    Figure = matplotlib_figure()
    models = list(dict.fromkeys(row["model"] for row in rows))
    styles = dict(zip(sorted({row["patches"] for row in rows}), _STYLES * len(rows)))
    timed = "saving" in rows[0]
    columns = 2 if timed else 1
    figure = Figure(figsize=(5 * columns, 0.6 + 3.8 * len(models)), dpi=150, layout="constrained")
    axes = figure.subplots(len(models), columns, squeeze=False, sharex="col", sharey="col")
    for line, model in enumerate(models):
        for patches, style in styles.items():
            curve = [row for row in rows if (row["model"], row["patches"]) == (model, patches)]
            curve.sort(key=lambda row: row["keep_rate"])
            _draw_counts(axes[line, 0], curve, *style)
            if timed:
                _draw_saving(axes[line, 1], curve, *style)
        axes[line, 0].set_title(model, loc="left", fontsize=10, fontweight="bold", color=INK)
        axes[line, 0].set_ylabel("GMACs of one clip")
        if timed:
            axes[line, 1].set_ylabel("saved time, measured (%)")
            most = 100 * max(row["theory"] for row in rows)
            axes[line, 1].plot([0, most], [0, most], ":", color=INK, lw=1, label="if time followed the MACs")
            _mark_keep_rates(axes[line, 1], curve)
    axes[-1, 0].set_xlabel("keep-rate of each pruning block")
    axes[0, 0].set_ylim(bottom=0)
    if timed:
        axes[-1, 1].set_xlabel("saved MACs, by the paper's count (%)")
    for axis in axes.flat:
        plain_axis(axis)
    _draw_legends(axes[0], styles, any(row["gmacs_printed"] is not None for row in rows))
    title = "MACs and time of one clip by keep-rate" if timed else "MACs of one clip by keep-rate"
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.02, ha="left", color=INK)
    if timed:
        figure.supxlabel(_describe_timing(rows[0]), fontsize=8, color=FAINT)
    return figure


def _draw_counts(axis: Axes, curve: Sequence[Row], color: str, marker: str) -> None:
    rates = [row["keep_rate"] for row in curve]
    axis.plot(rates, [row["gmacs_paper"] for row in curve], "-", color=color, lw=1.2)
    axis.plot(rates, [row["gmacs_computed"] for row in curve], "--", color=color, lw=1.2)
    printed = [(row["keep_rate"], row["gmacs_printed"]) for row in curve if row["gmacs_printed"] is not None]
    if printed:
        axis.plot(*zip(*printed), marker, color=color, mfc="none", ms=6)


def _draw_saving(axis: Axes, curve: Sequence[Row], color: str, marker: str) -> None:
    theory = [100 * row["theory"] for row in curve]
    dense = curve[0]["ms_per_clip"] / (1 - curve[0]["saving"])  # the same at all keep-rates
    low, middle, high = (
        [100 * (1 - row[key] / dense) for row in curve] for key in ("ms_per_clip_p80", "ms_per_clip", "ms_per_clip_p20")
    )
    axis.vlines(theory, low, high, color=color, lw=1)
    axis.plot(theory, middle, "-", color=color, marker=marker, lw=1.2, ms=5)


def _mark_keep_rates(axis: Axes, curve: Sequence[Row]) -> None:
    """Mark the keep-rates of these rows along the top. With other numbers of patches they are shifted slightly."""
    top = axis.secondary_xaxis("top")
    top.set_xticks([100 * row["theory"] for row in curve], [f"{row['keep_rate']:g}" for row in curve], fontsize=8)
    top.tick_params(length=2.5, color=FAINT)
    top.spines["top"].set_visible(False)
    top.set_xlabel(f"keep-rate ({curve[0]['patches']} patches)", fontsize=8)


def _draw_legends(axes: Sequence[Axes], styles: Mapping[int, tuple[str, str]], printed: bool) -> None:
    from matplotlib.lines import Line2D

    line: dict[str, Any] = {"color": INK, "lw": 1.2}
    handles = [Line2D([], [], color=c, marker=m, ls="", label=f"{n} patches") for n, (c, m) in styles.items()]
    counts = [Line2D([], [], label="paper's count", **line), Line2D([], [], ls="--", label="computed", **line)]
    if printed:
        counts.append(Line2D([], [], color=INK, marker="o", mfc="none", ls="", label="printed in the paper"))
    axes[0].legend(handles=handles + counts, frameon=False, fontsize=8, loc="upper left")
    if len(axes) > 1:
        axes[1].legend(frameon=False, fontsize=8, loc="upper left")


def _describe_timing(row: Row) -> str:
    compiled = "; torch.compile included" if row["compiled"] else ""
    return (
        f"{row['device']}; torch {row['torch']}, {row['amp']}{compiled}; {row['batch_size']} clips per call, "
        f"{row['rounds']} rounds: median time, bars from the 20th to the 80th percentile"
    )
