"""Figures: the patches that pruning keeps of a clip, and accuracy against cost by keep-rate. Needs matplotlib."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .constants import HIGH_HZ, HOP, LOW_HZ, MEL_BINS, PATCH, SAMPLE_RATE, mel, patch_grid
from .errors import UserError
from .files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Fraction of the patches that the pruning blocks keep: one number, or one for each block.
KeepRate = float | Sequence[float]

HOP_SECONDS = HOP / SAMPLE_RATE  # from frame to frame
INK, FAINT = "#222222", "#8a8a8a"
#: RGB of cells without a patch.
BLANK = np.array([0.945, 0.945, 0.95])
#: A patch every 16 mel bins and frames: patches do not overlap.
DISJOINT = (PATCH, PATCH)
_TICKS_HZ = (125, 500, 1000, 2000, 4000, 8000)
_ONE_ROW = 256  # up to this many frames the panels are in one row, above it in one column
_SUFFIXES = (".png", ".svg", ".pdf")


def keep_rate_text(keep_rate: KeepRate, separator: str = ",") -> str:
    """A keep-rate as text: ``"0.7"``, or ``"0.9,0.7,0.5"`` where the pruning blocks have different rates."""
    rates = [keep_rate] if isinstance(keep_rate, (int, float)) else list(keep_rate)
    if len(set(rates)) == 1:
        rates = rates[:1]
    return separator.join(f"{rate:g}" for rate in rates)


def plot_kept_patches(
    fbank: Any,
    kept: Sequence[tuple[str, Any]],
    *,
    title: str,
    subtitle: str = "",
    sounding: int | None = None,
    start: float = 0.0,
    stride: tuple[int, int] = DISJOINT,
) -> Figure:
    """The spectrogram of the model's input, and the patches that remain after each pruning stage.

    Args:
        fbank: ``[frames, 128]`` log-mel array, normalized or not.
        kept: ``(name, grid)`` of each stage: a boolean array ``[mel rows, time columns]`` that is True where the patch
            is kept. Mel row 0 is the lowest band. The input before any pruning is added as the first panel.
        title: first line, in bold.
        subtitle: second line.
        sounding: number of frames that contain sound. The frames after them are padding and are hatched. None: all.
        start: time in seconds of the first frame in the clip.
        stride: mel bins and frames from one patch to the next, ``(frequency, time)``. Where patches overlap, a cell is
            shown if any kept patch covers it. Cells that no patch covers are blank in all panels.

    Returns:
        matplotlib ``Figure``. It is not part of a window or of global state, so it need not be closed.
    """
    Figure = matplotlib_figure()
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    fbank = np.asarray(fbank, dtype=np.float64)
    frames, sounding = len(fbank), len(fbank) if sounding is None else min(sounding, len(fbank))
    columns, rows = patch_grid(frames, stride)
    panels = [("input", np.ones((rows, columns), dtype=bool)), *kept]
    colors = log_mel_colors(fbank, sounding)

    one_row = frames <= _ONE_ROW
    width = (1.0 + len(panels) * max(2.2, 2.4 * frames / 128)) if one_row else 11.0
    height = 3.7 if one_row else 0.95 + 1.62 * len(panels)
    layout = ConstrainedLayoutEngine(hspace=0.03, h_pad=0.05, w_pad=0.05, rect=(0, 0, 1, 1 - 0.62 / height))
    figure = Figure(figsize=(width, height), dpi=150, layout=layout)
    shape = (1, len(panels)) if one_row else (len(panels), 1)
    axes = figure.subplots(*shape, sharex=True, sharey=True, squeeze=False)
    for axis, (name, grid) in zip(axes.flat, panels, strict=True):
        draw_patches(axis, colors, np.asarray(grid, dtype=bool), start, sounding, stride)
        count = int(np.sum(grid))
        share = f" of {grid.size} ({100 * count / grid.size:.0f} %)" if count < grid.size else " patches"
        axis.set_title(f"{name}: {count}{share}", loc="left", fontsize=9, color=INK, pad=4)
    for axis in axes[-1]:
        axis.set_xlabel("time (s)", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("mel band (Hz)", fontsize=8)
    if note := coverage_note(frames, stride):
        figure.supxlabel(note, fontsize=8)
    left = 0.12 / width
    figure.text(left, 1 - 0.12 / height, title, va="top", fontsize=12, fontweight="bold", color=INK)
    figure.text(left, 1 - 0.36 / height, subtitle, va="top", fontsize=9, color=FAINT)
    return figure


def plot_tradeoff(
    rows: Sequence[Mapping[str, Any]], metric: str, title: str, dense_clips_per_second: float | None = None
) -> Figure:
    """Accuracy against cost: multiply-accumulates on the left, measured speed on the right.

    Keep-rates that all pruning blocks share are joined by a line. A setting with different rates is a single marker.

    Args:
        rows: dicts with ``keep_rate``, ``metric`` (0 to 1), ``gmacs_paper``, ``theory`` (fraction of the unpruned work
            that is saved) and, if speed was measured, ``clips_per_second``.
        metric: name of the metric, for the axis.
        title: title of the figure.
        dense_clips_per_second: speed of the fastest unpruned variant; None omits the right half.

    Returns:
        matplotlib ``Figure``.
    """
    Figure = matplotlib_figure()
    rows = sorted(rows, key=lambda row: -row["gmacs_paper"])
    timed = dense_clips_per_second is not None
    figure = Figure(figsize=(9.5 if timed else 5, 3.8), dpi=150, layout="constrained")
    axes = figure.subplots(1, 2 if timed else 1, sharey=True, squeeze=False)[0]
    axes[0].set_xlabel("GMACs of one clip (the paper's count)")
    axes[0].set_ylabel(f"{metric} (%)")
    _draw_rows(axes[0], rows, [row["gmacs_paper"] for row in rows], "#1f5fa8")
    if dense_clips_per_second is not None:
        expected = [dense_clips_per_second / (1 - row["theory"]) for row in rows]
        axes[1].set_xlabel("clips per second")
        style = {"linestyle": "--", "lw": 1, "mfc": "white"}
        _draw_points(axes[1], rows, expected, FAINT, label="if time followed the MACs", **style)
        _draw_rows(axes[1], rows, [row["clips_per_second"] for row in rows], "#c2491d", label="measured")
        axes[1].legend(frameon=False, fontsize=8, loc="lower left")
    for axis in axes:
        plain_axis(axis)
        axis.margins(x=0.1, y=0.18)
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.02, ha="left")
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure to ``path``. The suffix of the path chooses the format."""
    check_plot_path(path)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format=str(path).rsplit(".", 1)[-1].lower())


def check_plot_path(path: str | os.PathLike[str]) -> None:
    """Raise a ``UserError`` if ``path`` has no known suffix or matplotlib is not installed."""
    if not str(path).lower().endswith(_SUFFIXES):
        raise UserError(f"{path}: the name of a picture must end in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}")
    matplotlib_figure()


def mel_bin(hertz: float) -> float:
    """Position of a frequency on the axis of mel bins, where bin ``i`` covers ``i`` to ``i + 1``.

    The bins are ``MEL_BINS`` triangles on Kaldi's mel scale between ``LOW_HZ`` and ``HIGH_HZ``.
    """
    low, high = mel(LOW_HZ), mel(HIGH_HZ)
    # Triangle i peaks (i + 1) steps above the lower end, and its bin is drawn around i + 1/2.
    return (mel(hertz) - low) / ((high - low) / (MEL_BINS + 1)) - 0.5


def matplotlib_figure() -> type[Figure]:
    """matplotlib's ``Figure``. Its figures are not part of a window or of global state, so they need not be closed.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("pictures need matplotlib, which is not installed: pip install matplotlib") from error
    return Figure


def log_mel_colors(fbank: NDArray[np.floating], sounding: int) -> NDArray[np.floating]:
    """RGB image ``[128, frames, 3]`` of a log-mel, with the contrast of the ``sounding`` first frames."""
    from matplotlib import colormaps

    low, high = np.percentile(fbank[:sounding] if sounding else fbank, [3, 99.7])
    image = np.clip((fbank - low) / max(high - low, 1e-6), 0, 1)
    return np.asarray(colormaps["magma"](image.T))[..., :3]


def covered_cells(grid: NDArray[np.bool_], frames: int, stride: tuple[int, int]) -> NDArray[np.bool_]:
    """Cells of a spectrogram that at least one of the chosen patches covers.

    Args:
        grid: bool array ``[mel rows, time columns]``, mel row 0 the lowest: True where the patch is chosen.
        frames: frames of the spectrogram.
        stride: mel bins and frames from one patch to the next, ``(frequency, time)``.

    Returns:
        bool array ``[128, frames]``, mel bin 0 the lowest.
    """
    of_frequency, of_time = stride
    cells = np.zeros((MEL_BINS, frames), dtype=bool)
    for row, column in np.argwhere(grid) * (of_frequency, of_time):
        cells[row : row + PATCH, column : column + PATCH] = True
    return cells


def coverage_note(frames: int, stride: tuple[int, int]) -> str:
    """Sentence for a picture of kept patches whose patches overlap or do not cover all frames; else empty."""
    if stride == DISJOINT and frames % PATCH == 0:
        return ""
    return "shown: cells that at least one kept patch covers"


def draw_patches(
    axis: Axes,
    colors: NDArray[np.floating],
    grid: NDArray[np.bool_],
    start: float,
    sounding: int,
    stride: tuple[int, int] = DISJOINT,
) -> None:
    """Draw the cells that kept patches cover, all other cells blank, and the padding hatched.

    Args:
        axis: matplotlib ``Axes``.
        colors: RGB image ``[128, frames, 3]`` of ``log_mel_colors``.
        grid: bool array ``[mel rows, time columns]``, mel row 0 the lowest: True where the patch is kept.
        start: time in seconds of the first frame.
        sounding: number of frames that contain sound.
        stride: mel bins and frames from one patch to the next, ``(frequency, time)``.
    """
    from matplotlib.patches import Rectangle

    frames = colors.shape[1]
    end = start + frames * HOP_SECONDS
    axis.imshow(
        np.where(covered_cells(grid, frames, stride)[..., None], colors, BLANK),
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        extent=(start, end, 0, MEL_BINS),
    )
    if not grid.all():  # borders make single patches countable, but overlapping patches have none
        top, right = ((size - 1) * step + PATCH for size, step in zip(grid.shape, stride, strict=True))
        if stride[1] == PATCH:
            axis.vlines(start + np.arange(PATCH, frames, PATCH) * HOP_SECONDS, 0, top, color="white", lw=0.5)
        if stride[0] == PATCH:
            axis.hlines(np.arange(PATCH, MEL_BINS, PATCH), start, start + right * HOP_SECONDS, color="white", lw=0.5)
    if sounding < frames:
        corner = (start + sounding * HOP_SECONDS, 0)
        size = (end - corner[0], MEL_BINS)
        axis.add_patch(Rectangle(corner, *size, fill=False, hatch="////", lw=0, edgecolor="#9a9a9a", alpha=0.55))
        axis.axvline(corner[0], color="#5ec8ff", lw=1.2)
        if grid.all():  # in other panels the word would hide which patches of the padding are kept
            narrow = sounding > 0.88 * frames
            axis.text(
                (corner[0] + end) / 2,
                MEL_BINS / 2,
                "padding",
                ha="center",
                va="center",
                rotation=90 if narrow else 0,
                fontsize=7.5,
                color=INK,
                bbox={"boxstyle": "round,pad=0.25", "fc": "white", "ec": "none", "alpha": 0.85},
            )
    spectrogram_axis(axis, frames, start)


def mark_pauses(axis: Axes, pauses: NDArray[np.bool_]) -> None:
    """Draw a bar below a spectrogram, under the frames where ``pauses``, a bool array ``[frames]``, is True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], pauses, [False]]).astype(np.int8)))
    runs = [
        (begin * HOP_SECONDS, (end - begin) * HOP_SECONDS) for begin, end in zip(edges[::2], edges[1::2], strict=True)
    ]
    axis.broken_barh(runs, (-0.045, 0.03), color="#d55e00", lw=0, transform=axis.get_xaxis_transform(), clip_on=False)


def plain_axis(axis: Axes) -> None:
    """Draw faint grid lines behind the curves and no frame at the top and on the right."""
    axis.grid(color="#e6e6e6", lw=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def spectrogram_axis(axis: Axes, frames: int, start: float = 0.0) -> None:
    """Set up the axis of a spectrogram: ``frames`` frames from ``start`` seconds, and mel bands marked in Hz."""
    names = [f"{hertz // 1000}k" if hertz >= 1000 else str(hertz) for hertz in _TICKS_HZ]
    axis.set_yticks([min(mel_bin(hertz), MEL_BINS) for hertz in _TICKS_HZ], names)
    axis.set_ylim(0, MEL_BINS)
    axis.set_xlim(start, start + frames * HOP_SECONDS)
    axis.tick_params(labelsize=7.5, length=2.5, color=FAINT)
    axis.spines[:].set_visible(False)


def _draw_rows(axis: Axes, rows: Sequence[Mapping[str, Any]], x: Sequence[float], color: str, **style: Any) -> None:
    """Draw the metric of each row over ``x``, with its keep-rate as a label."""
    _draw_points(axis, rows, x, color, linestyle="-", lw=1.6, **style)
    for position, row in zip(x, rows, strict=True):
        axis.annotate(
            keep_rate_text(row["keep_rate"]),
            (position, 100 * row["metric"]),
            (0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=INK,
            bbox={"boxstyle": "round,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.7},
        )


def _draw_points(axis: Axes, rows: Sequence[Mapping[str, Any]], x: Sequence[float], color: str, **style: Any) -> None:
    points = [(position, 100 * row["metric"]) for position, row in zip(x, rows, strict=True)]
    shared = [isinstance(row["keep_rate"], (int, float)) for row in rows]
    line = [point for point, in_line in zip(points, shared, strict=True) if in_line]
    single = [point for point, in_line in zip(points, shared, strict=True) if not in_line]
    axis.plot([x for x, _ in line], [y for _, y in line], color=color, marker="o", ms=5, **style)
    if single:
        fill = style.get("mfc", color)
        axis.plot([x for x, _ in single], [y for _, y in single], "D", color=color, mfc=fill, ms=5)
