"""Multiply-accumulates of one clip by patches and keep-rate (paper, Table II), and the time that goes with them."""

import json
import os

import torch

from ..constants import VERSION
from ..errors import UserError
from ..files import atomic_write
from ..models import create_model
from ..models.macs import count_macs
from ..ops.backend import ENVIRONMENT, ISA_ENVIRONMENT
from ..plot import FAINT, INK, matplotlib_figure, plain_axis
from ..report import gmacs_text, markdown_lines
from ..runtime.timing import Speed, measure_speed

#: The paper's Table II: GMACs of one clip, frames -> keep-rate -> number as printed. It is of ViT-B with one CLS token.
PRINTED_GMACS = {
    128: {1.0: 5.6, 0.9: 4.9, 0.8: 4.3, 0.7: 3.7, 0.6: 3.3, 0.5: 2.8, 0.4: 2.5},
    512: {1.0: 23.1, 0.9: 20.0, 0.8: 17.3, 0.7: 15.0, 0.6: 13.1, 0.5: 11.4, 0.4: 10.0},
    1024: {1.0: 48.6, 0.9: 41.8, 0.8: 36.0, 0.7: 31.1, 0.6: 27.1, 0.5: 23.7, 0.4: 20.8},
}
_PRINTED_MODELS = ("audiomae_base", "ast_base")
_STYLES = (  # Okabe-Ito colours, each with a marker of its own
    ("#0072b2", "o"),
    ("#d55e00", "s"),
    ("#009e73", "^"),
    ("#cc79a7", "D"),
    ("#56b4e9", "v"),
    ("#e69f00", "P"),
)


def count_rows(name, frames, keep_rates):
    """What a model is said to cost: one dict per keep-rate.

    Args:
        name: of a model, see ``list_models``.
        frames: of its input.
        keep_rates: numbers in (0, 1], the same in all pruning blocks.

    Returns:
        list of dicts: ``gmacs_printed`` (the paper's Table II; None where it has no such cell), ``gmacs_paper`` (our
        count as the paper counts), ``difference`` of the two, ``gmacs_computed`` (what is really computed, with a head
        of 527 classes), ``theory`` (share of the unpruned work that is saved, by the paper's count).

    Raises:
        UserError: there is no such model, or it cannot have these frames or keep-rates.
    """
    with torch.device("meta"):  # no weights are needed
        model = create_model(name, frames=frames)
    dense = count_macs(model).paper
    printed = PRINTED_GMACS.get(frames, {}) if name in _PRINTED_MODELS else {}
    rows = []
    for keep_rate in keep_rates:
        model.set_keep_rate(keep_rate)
        macs = count_macs(model)
        cell = printed.get(keep_rate)
        rows.append(
            {
                "model": name,
                "frames": frames,
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


def speed_rows(rows, speed, options):
    """The rows of ``count_rows`` with what was measured (`Speed`, see there) and how (``time_cell``)."""
    how = {name: value for name, value in options.items() if name not in ("model", "frames", "keep_rates")}
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


def cell_options(name, frames, keep_rates, device_name, *, batch_size, amp, rounds, compiled):
    """All that the time of a model depends on, as plain values."""
    return {
        "model": name,
        "frames": frames,
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


def time_cell(options, device):
    """Measure what ``cell_options`` describes, with fresh weights and noise for clips: `Speed`."""
    model = create_model(options["model"], frames=options["frames"]).to(device).eval()
    how = {name: options[name] for name in ("batch_size", "amp", "rounds", "compiled")}
    return measure_speed(model, options["keep_rates"], device, **how)


class Timings:
    """Measured times in a JSON file, by what they depend on: a stopped run loses nothing, a longer table adds to it.

    Args:
        path: file, made by the first ``add``.

    Raises:
        UserError: there is a file, and it is something else.
    """

    def __init__(self, path):
        self.path, self._entries = path, []
        if not path.exists():
            return
        try:
            for entry in json.loads(path.read_text(encoding="utf-8")):
                seconds = {float(keep_rate): variants for keep_rate, variants in entry["seconds"].items()}
                self._entries.append((entry["options"], Speed(seconds)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{path}: not the times that python/table2.py keeps ({error}); delete it or give another --output"
            ) from None

    def find(self, options):
        """The `Speed` measured with these ``cell_options``, or None."""
        return next((speed for known, speed in self._entries if known == options), None)

    def add(self, options, speed):
        """Keep a `Speed`; it is on the disk when this returns."""
        self._entries.append((options, speed))
        content = [{"options": options, "seconds": speed.seconds} for options, speed in self._entries]
        with atomic_write(self.path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def table_lines(rows):
    """The rows as a Markdown table, a list of lines."""
    columns = [
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
        columns.append(("realised", "realised", "{:.0%}".format))
    return markdown_lines(columns, rows)


def plot_table2(rows):
    """One row of panels a model: GMACs by keep-rate, and where time was measured, its saving against that of the MACs.

    Args:
        rows: of ``count_rows`` or ``speed_rows``.

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
            axes[line, 1].set_ylabel("time saved, measured (%)")
            most = 100 * max(row["theory"] for row in rows)
            axes[line, 1].plot([0, most], [0, most], ":", color=INK, lw=1, label="if time followed the count")
            _mark_keep_rates(axes[line, 1], curve)
    axes[-1, 0].set_xlabel("keep-rate of each pruning block")
    axes[0, 0].set_ylim(bottom=0)
    if timed:
        axes[-1, 1].set_xlabel("work saved, by the paper's count (%)")
    for axis in axes.flat:
        plain_axis(axis)
    _draw_legends(axes[0], styles, any(row["gmacs_printed"] is not None for row in rows))
    title = "Work and time of one clip by keep-rate" if timed else "Work of one clip by keep-rate"
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.02, ha="left", color=INK)
    if timed:
        figure.supxlabel(_describe_timing(rows[0]), fontsize=8, color=FAINT)
    return figure


def _draw_counts(axis, curve, colour, marker):
    rates = [row["keep_rate"] for row in curve]
    axis.plot(rates, [row["gmacs_paper"] for row in curve], "-", color=colour, lw=1.2)
    axis.plot(rates, [row["gmacs_computed"] for row in curve], "--", color=colour, lw=1.2)
    printed = [(row["keep_rate"], row["gmacs_printed"]) for row in curve if row["gmacs_printed"] is not None]
    if printed:
        axis.plot(*zip(*printed), marker, color=colour, mfc="none", ms=6)


def _draw_saving(axis, curve, colour, marker):
    theory = [100 * row["theory"] for row in curve]
    dense = curve[0]["ms_per_clip"] / (1 - curve[0]["saving"])  # whatever the keep-rate
    low, middle, high = (
        [100 * (1 - row[key] / dense) for row in curve] for key in ("ms_per_clip_p80", "ms_per_clip", "ms_per_clip_p20")
    )
    axis.vlines(theory, low, high, color=colour, lw=1)
    axis.plot(theory, middle, "-", color=colour, marker=marker, lw=1.2, ms=5)


def _mark_keep_rates(axis, curve):
    """Keep-rates along the top, where these rows have them; with other patches they lie little beside."""
    top = axis.secondary_xaxis("top")
    top.set_xticks([100 * row["theory"] for row in curve], [f"{row['keep_rate']:g}" for row in curve], fontsize=8)
    top.tick_params(length=2.5, color=FAINT)
    top.spines["top"].set_visible(False)
    top.set_xlabel(f"keep-rate ({curve[0]['patches']} patches)", fontsize=8)


def _draw_legends(axes, styles, printed):
    from matplotlib.lines import Line2D

    grey = dict(color=INK, lw=1.2)
    handles = [Line2D([], [], color=c, marker=m, ls="", label=f"{n} patches") for n, (c, m) in styles.items()]
    counts = [Line2D([], [], label="paper's count", **grey), Line2D([], [], ls="--", label="really computed", **grey)]
    if printed:
        counts.append(Line2D([], [], color=INK, marker="o", mfc="none", ls="", label="printed in the paper"))
    axes[0].legend(handles=handles + counts, frameon=False, fontsize=8, loc="upper left")
    if len(axes) > 1:
        axes[1].legend(frameon=False, fontsize=8, loc="upper left")


def _describe_timing(row):
    compiled = ", torch.compile tried" if row["compiled"] else ""
    return (
        f"{row['device']}; torch {row['torch']}, {row['amp']}{compiled}; {row['batch_size']} clips a call, "
        f"{row['rounds']} rounds: median time, bars from its 20th to its 80th percentile"
    )
