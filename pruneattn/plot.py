"""Pictures: what pruning keeps of a clip, and what it costs and gains over the keep-rates. Needs matplotlib."""

import numpy as np

from .constants import HIGH_HZ, LOW_HZ, MEL_BINS, PATCH, mel
from .errors import UserError
from .files import atomic_write

HOP_SECONDS = 0.01  # seconds from frame to frame
_TICKS_HZ = (125, 500, 1000, 2000, 4000, 8000)
_DROPPED = np.array([0.945, 0.945, 0.95])
INK, FAINT = "#222222", "#8a8a8a"
_SIDE_BY_SIDE = 256  # up to so many frames the stages stand beside, not below one another
_SUFFIXES = (".png", ".svg", ".pdf")


def plot_kept_patches(fbank, kept, *, title, subtitle="", sounding=None, start=0.0):
    """The spectrogram as the model sees it, and what is left of it after each pruning stage.

    Args:
        fbank: ``[frames, 128]`` log-mel array, normalised or not.
        kept: list of ``(name, grid)``: a stage's name, and a boolean array ``[128 // 16, frames // 16]`` (mel row 0 is
            the lowest band) that is True where the patch is kept. The stage before any pruning is drawn by itself.
        title: first line, in bold.
        subtitle: second line.
        sounding: frames that hold sound; what follows is padding and is hatched. None: all.
        start: second of the clip at which the picture begins.

    Returns:
        matplotlib ``Figure``; it belongs to no window and no global state, so nothing needs closing.
    """
    Figure = matplotlib_figure()
    fbank = np.asarray(fbank, dtype=np.float64)
    frames, sounding = len(fbank), len(fbank) if sounding is None else min(sounding, len(fbank))
    rows, columns = MEL_BINS // PATCH, frames // PATCH
    panels = [("input", np.ones((rows, columns), dtype=bool)), *kept]
    colours = log_mel_colours(fbank, sounding)

    beside = frames <= _SIDE_BY_SIDE
    width = (1.0 + len(panels) * max(2.2, 2.4 * frames / 128)) if beside else 11.0
    height = 3.7 if beside else 0.95 + 1.62 * len(panels)
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    figure.get_layout_engine().set(hspace=0.03, h_pad=0.05, w_pad=0.05, rect=(0, 0, 1, 1 - 0.62 / height))
    axes = figure.subplots(*((1, len(panels)) if beside else (len(panels), 1)), sharex=True, sharey=True, squeeze=False)
    for axis, (name, grid) in zip(axes.flat, panels, strict=True):
        draw_patches(axis, colours, np.asarray(grid, dtype=bool), start, sounding)
        count = int(np.sum(grid))
        share = f" of {grid.size} ({100 * count / grid.size:.0f} %)" if count < grid.size else " patches"
        axis.set_title(f"{name}: {count}{share}", loc="left", fontsize=9, color=INK, pad=4)
    for axis in axes[-1]:
        axis.set_xlabel("time (s)", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("mel band (Hz)", fontsize=8)
    left = 0.12 / width
    figure.text(left, 1 - 0.12 / height, title, va="top", fontsize=12, fontweight="bold", color=INK)
    figure.text(left, 1 - 0.36 / height, subtitle, va="top", fontsize=9, color=FAINT)
    return figure


def plot_tradeoff(rows, metric, title, dense_clips_per_second=None):
    """Accuracy against what it costs: counted work on the left, measured speed on the right.

    Args:
        rows: dicts with ``keep_rate``, ``metric`` (0..1), ``gmacs_paper``, ``theory`` (share of the unpruned work that
            is saved) and, if speed was measured, ``clips_per_second``.
        metric: name of the metric, for the axis.
        title: over the whole figure.
        dense_clips_per_second: speed of the fastest unpruned variant; None leaves the right half out.

    Returns:
        matplotlib ``Figure``.
    """
    Figure = matplotlib_figure()
    rows = sorted(rows, key=lambda row: -row["keep_rate"])
    timed = dense_clips_per_second is not None
    figure = Figure(figsize=(9.5 if timed else 5, 3.8), dpi=150, layout="constrained")
    axes = figure.subplots(1, 2 if timed else 1, sharey=True, squeeze=False)[0]
    score = [100 * row["metric"] for row in rows]
    axes[0].set_xlabel("GMACs of one clip (the paper's count)")
    axes[0].set_ylabel(f"{metric} (%)")
    _curve(axes[0], [row["gmacs_paper"] for row in rows], score, rows, "#1f5fa8")
    if timed:
        promised = [dense_clips_per_second / (1 - row["theory"]) for row in rows]
        axes[1].set_xlabel("clips per second")
        axes[1].plot(promised, score, "--o", color=FAINT, mfc="white", lw=1, ms=5, label="if time followed the MACs")
        _curve(axes[1], [row["clips_per_second"] for row in rows], score, rows, "#c2491d", label="measured")
        axes[1].legend(frameon=False, fontsize=8, loc="lower left")
    for axis in axes:
        plain_axis(axis)
        axis.margins(x=0.1, y=0.18)
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.02, ha="left")
    return figure


def save_figure(figure, path):
    """Write a figure to ``path``; its suffix chooses the format."""
    check_plot_path(path)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format=str(path).rsplit(".", 1)[-1].lower())


def check_plot_path(path):
    """Raise a ``UserError`` if no picture can be written to ``path`` for want of matplotlib or of a known suffix."""
    if not str(path).lower().endswith(_SUFFIXES):
        raise UserError(f"{path}: a picture's name must end in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}")
    matplotlib_figure()


def mel_bin(hertz):
    """Position of a frequency on the axis of mel bins, where bin ``i`` covers ``i`` to ``i + 1``.

    Kaldi's scale, ``1127 ln(1 + f / 700)``, with 128 triangles between 20 Hz and 8 kHz.
    """
    low, high = mel(LOW_HZ), mel(HIGH_HZ)
    # Triangle i peaks (i + 1) steps above the lower end, and its bin is drawn around i + 1/2.
    return (mel(hertz) - low) / ((high - low) / (MEL_BINS + 1)) - 0.5


def matplotlib_figure():
    """matplotlib's ``Figure``: figures made of it belong to no window and no global state, so nothing needs closing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("pictures need matplotlib: pip install matplotlib") from error
    return Figure


def log_mel_colours(fbank, sounding):
    """RGB image ``[128, frames, 3]`` of a log-mel, its contrast taken from the part that sounds."""
    from matplotlib import colormaps

    low, high = np.percentile(fbank[:sounding] if sounding else fbank, [3, 99.7])
    image = np.clip((fbank - low) / max(high - low, 1e-6), 0, 1)
    return colormaps["magma"](image.T)[..., :3]


def draw_patches(axis, colours, grid, start, sounding):
    """Draw the kept patches of a spectrogram, the others blank, and what follows the sound hatched.

    Args:
        axis: matplotlib ``Axes``.
        colours: RGB image ``[128, frames, 3]`` of ``log_mel_colours``.
        grid: bool array ``[8, frames // 16]``, mel row 0 the lowest: True where the patch is kept.
        start: second at which the picture begins.
        sounding: frames that hold sound.
    """
    from matplotlib.patches import Rectangle

    frames = colours.shape[1]
    end = start + frames * HOP_SECONDS
    shown = np.kron(grid, np.ones((PATCH, PATCH)))[..., None]
    axis.imshow(
        colours * shown + _DROPPED * (1 - shown),
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        extent=(start, end, 0, MEL_BINS),
    )
    if not grid.all():  # borders make single patches countable
        lines = dict(color="white", lw=0.5)
        axis.vlines(start + np.arange(PATCH, frames, PATCH) * HOP_SECONDS, 0, MEL_BINS, **lines)
        axis.hlines(np.arange(PATCH, MEL_BINS, PATCH), start, end, **lines)
    if sounding < frames:
        corner = (start + sounding * HOP_SECONDS, 0)
        hatch = dict(fill=False, hatch="////", lw=0, edgecolor="#9a9a9a", alpha=0.55)
        axis.add_patch(Rectangle(corner, end - corner[0], MEL_BINS, **hatch))
        axis.axvline(corner[0], color="#5ec8ff", lw=1.2)
        if grid.all():  # elsewhere the word would hide which patches of the padding are kept
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
                bbox=dict(boxstyle="round,pad=0.25", fc="white", ec="none", alpha=0.85),
            )
    spectrogram_axis(axis, frames, start)


def mark_pauses(axis, pauses):
    """A bar below a spectrogram, under the frames of ``pauses``, a bool array ``[frames]``."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], pauses, [False]]).astype(np.int8)))
    runs = [(begin * HOP_SECONDS, (end - begin) * HOP_SECONDS) for begin, end in zip(edges[::2], edges[1::2])]
    axis.broken_barh(runs, (-0.045, 0.03), color="#d55e00", lw=0, transform=axis.get_xaxis_transform(), clip_on=False)


def plain_axis(axis):
    """Faint grid lines behind the curves, no frame above and to the right."""
    axis.grid(color="#e6e6e6", lw=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def spectrogram_axis(axis, frames, start=0.0):
    """Seconds from left to right, mel bands from bottom to top, marked in Hz; ``frames`` of 10 ms from ``start`` s."""
    names = [f"{hertz // 1000}k" if hertz >= 1000 else str(hertz) for hertz in _TICKS_HZ]
    axis.set_yticks([min(mel_bin(hertz), MEL_BINS) for hertz in _TICKS_HZ], names)
    axis.set_ylim(0, MEL_BINS)
    axis.set_xlim(start, start + frames * HOP_SECONDS)
    axis.tick_params(labelsize=7.5, length=2.5, color=FAINT)
    axis.spines[:].set_visible(False)


def _curve(axis, x, y, rows, colour, **style):
    axis.plot(x, y, "-o", color=colour, lw=1.6, ms=5, **style)
    for x_, y_, row in zip(x, y, rows, strict=True):
        axis.annotate(
            f"{row['keep_rate']:g}",
            (x_, y_),
            (0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=INK,
            bbox=dict(boxstyle="round,pad=0.1", fc="white", ec="none", alpha=0.7),
        )
