"""The table of an evaluation as text, CSV, JSON and Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .errors import UserError
from .files import TEXT, write_csv, write_json, write_lines, write_text
from .plot import plot_tradeoff, save_figure

FAILED = "failed_clips.txt"
METRIC_NAMES = {"map": "mAP", "mauc": "mAUC", "dprime": "d'", "top1": "top-1", "top5": "top-5"}
_SHARES = ("map", "top1", "top5")  # printed in percent


def table_text(rows, context):
    """The Markdown table, which also reads well in a terminal, under a line that says what was measured and how."""
    lines = [
        f"{context['checkpoint']} ({context['model']}, {context['score']} score) on {_where(context)}: "
        f"{context['clips']} clips",
        "",
        *_markdown(rows, context["metric"]),
        "",
    ]
    if "dense" in context:
        lines.append(
            f"Speed: model only, batches of {context['batch_size']}, {context['amp']}, {context['device']}, torch "
            f"{context['torch']}, medians of {context['rounds']} interleaved rounds. Dense: {context['dense']}, "
            f"{context['dense_clips_per_second']:.1f} clips/s. "
            "saving = 1 - t / t_dense, theory = 1 - MACs / MACs_dense "
            "(the paper's count), realised = saving / theory."
        )
    return "\n".join(lines)


def save_table(output, rows, context, labels, per_class, unread):
    """Write ``table.{csv,json,md}``, ``per_class_RATE.csv``, ``tradeoff.png`` and the list of clips that were left out.

    Args:
        output: folder, a ``Path``.
        rows: dicts, one per keep-rate.
        context: dict: what was measured and how.
        labels: names of the classes.
        per_class: per row the list of dicts of ``evaluate_predictions``.
        unread: list of ``(path, reason)``.
    """
    write_text(output / "table.md", table_text(rows, context) + "\n")
    write_json(output / "table.json", {**context, "rows": rows, "unread": unread})
    write_csv(output / "table.csv", rows)
    for row, classes in zip(rows, per_class, strict=True):
        named = [{"label": one["label"], "name": labels[one["label"]], **one} for one in classes]
        write_csv(output / f"per_class_{row['keep_rate']:g}.csv", named)
    # Lists and pictures of an earlier evaluation must not stand beside the new table.
    (output / "tradeoff.png").unlink(missing_ok=True)
    save_failed(output, unread)
    try:
        title = f"{context['model'].split(',')[0]} on {_where(context)} ({context['clips']} clips)"
        figure = plot_tradeoff(rows, METRIC_NAMES[context["metric"]], title, context.get("dense_clips_per_second"))
        save_figure(figure, output / "tradeoff.png")
    except UserError:  # without matplotlib the table has to do
        pass


def save_failed(output, failed):
    """Write the list of the clips that were left out, ``(path, reason)`` each, and return its path; no list if none."""
    path = output / FAILED
    path.unlink(missing_ok=True)
    if failed:
        write_text(path, "".join(f"{clip}\t{' '.join(reason.split())}\n" for clip, reason in failed))
    return path


def say_failed(failed, clips, path):
    """Print which of so many clips were left out, if any; ``path`` lists them all."""
    if failed:
        print(f"\n{len(failed)} of {clips} clips could not be read and do not count:")
        for clip, reason in failed[:10]:
            print(f"  {reason if clip in reason else f'{clip}: {reason}'}")
        if len(failed) > 10:
            print(f"  and {len(failed) - 10} more, all in {path}")


def _where(context):
    fold = "" if context["fold"] is None else f", fold {context['fold']}"
    return f"{context['dataset']}, {context['split']}{fold}"


def _markdown(rows, metric):
    others = ("mauc", "dprime") if metric == "map" else ("top5",)
    columns = [("keep-rate", "keep_rate", "{:g}".format)]
    for name in (metric, *others):
        share = name in _SHARES
        columns.append((METRIC_NAMES[name], name, "{:.2%}".format if share else "{:.3f}".format))
    columns += [("GMACs paper", "gmacs_paper", gmacs_text), ("GMACs computed", "gmacs_computed", gmacs_text)]
    if "clips_per_second" in rows[0]:
        columns.append(("clips/s", "clips_per_second", "{:.1f}".format))
        for key in rows[0]:
            if key.startswith("clips_per_second_"):
                columns.append((key.removeprefix("clips_per_second_"), key, "{:.1f}".format))
        columns.append(("saving", "saving", "{:.1%}".format))
    columns.append(("theory", "theory", "{:.1%}".format))
    if "clips_per_second" in rows[0]:
        columns.append(("realised", "realised", "{:.0%}".format))
    return markdown_lines(columns, rows)


def markdown_lines(columns, rows):
    """A Markdown table that also reads well in a terminal, as a list of lines.

    Args:
        columns: list of ``(head, key, show)``, where ``show`` makes text of a value; None becomes a dash.
        rows: list of dicts.
    """

    def cell(value, show):
        return "-" if value is None else show(value)

    cells = [[head for head, _, _ in columns]] + [[cell(row[key], show) for _, key, show in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    text = ["| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths)) + " |" for line in cells]
    return [text[0], "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|", *text[1:]]


def gmacs_text(value):
    """GMACs to three digits or so."""
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def add_failed(output: Path, failed: Iterable[tuple[str, str]]) -> int:
    """Add clips to ``failed_clips.txt`` of a training run. The list keeps the clips of all epochs.

    Lines are ``path: reason`` and sorted, as in the lists of earlier versions.

    Args:
        output: output folder of the run.
        failed: ``(path, reason)`` of each clip that could not be decoded.

    Returns:
        Number of clips in the list if it has changed, else 0.
    """
    path = output / FAILED
    known = set(path.read_text(encoding="utf-8").splitlines()) if path.exists() else set()
    texts = (" ".join(f"{clip}: {reason}".splitlines()) for clip, reason in failed)
    lines = known.union(text.encode(**TEXT).decode() for text in texts)  # as a later call reads them
    if lines == known:
        return 0
    write_lines(path, sorted(lines))
    return len(lines)
