"""Results as tables: text, CSV, JSON and Markdown, and the list of clips that could not be read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import TEXT, write_csv, write_json, write_lines, write_text
from .plot import KeepRate, keep_rate_text, plot_tradeoff, save_figure

#: Name of the file that lists the clips that could not be read.
FAILED = "failed_clips.txt"
METRIC_NAMES = {"map": "mAP", "mauc": "mAUC", "dprime": "d'", "top1": "top-1", "top5": "top-5"}
_PERCENT = ("map", "top1", "top5")  # metrics that are printed in percent

Row = dict[str, Any]
#: Head of a table column, key of its values in the rows, and a function that formats a value.
Column = tuple[str, str, Callable[[Any], str]]


def table_text(rows: Sequence[Row], context: Mapping[str, Any]) -> str:
    """The table of an evaluation as Markdown that is readable in a terminal, with the conditions of the measurement.

    Args:
        rows: one dict for each keep-rate.
        context: conditions of the measurement, by name.
    """
    model = f"{context['checkpoint']} ({context['model']}, {context['score']} score)"
    lines = [f"{model} on {_where(context)}: {context['clips']} clips", "", *_markdown(rows, context["metric"]), ""]
    if "dense" in context:
        lines.append(
            f"Speed: model only, batches of {context['batch_size']}, {context['amp']}, {context['device']}, torch "
            f"{context['torch']}, medians of {context['rounds']} interleaved rounds. Dense: {context['dense']}, "
            f"{context['dense_clips_per_second']:.1f} clips/s. "
            "saving = 1 - t / t_dense, theory = 1 - MACs / MACs_dense "
            "(the paper's count), realized = saving / theory."
        )
    return "\n".join(lines)


def save_table(
    output: Path,
    rows: Sequence[Row],
    context: Mapping[str, Any],
    labels: Sequence[str],
    per_class: Sequence[Sequence[Row]],
    unread: Sequence[tuple[str, str]],
) -> None:
    """Write the files of an evaluation.

    These are ``table.{csv,json,md}``, ``per_class_RATE.csv`` for each row, ``tradeoff.png`` (with matplotlib) and, if
    there are unread clips, ``failed_clips.txt``.

    Args:
        output: folder.
        rows: one dict for each keep-rate.
        context: conditions of the measurement, by name.
        labels: names of the classes.
        per_class: for each row ``per_class`` of ``evaluate_predictions``.
        unread: ``(path, reason)`` of each clip that could not be read.
    """
    write_text(output / "table.md", table_text(rows, context) + "\n")
    write_json(output / "table.json", {**context, "rows": rows, "unread": unread})
    write_csv(output / "table.csv", [{**row, "keep_rate": _csv_value(row["keep_rate"])} for row in rows])
    for row, classes in zip(rows, per_class, strict=True):
        named = [{"label": one["label"], "name": labels[one["label"]], **one} for one in classes]
        write_csv(output / f"per_class_{keep_rate_text(row['keep_rate'], '-')}.csv", named)
    # A list and a picture of an earlier evaluation must not stay next to the new table.
    (output / "tradeoff.png").unlink(missing_ok=True)
    save_failed(output, unread)
    try:
        title = f"{context['model'].split(',')[0]} on {_where(context)} ({context['clips']} clips)"
        figure = plot_tradeoff(rows, METRIC_NAMES[context["metric"]], title, context.get("dense_clips_per_second"))
        save_figure(figure, output / "tradeoff.png")
    except UserError:  # matplotlib is not installed: the table is enough
        pass


def save_failed(output: Path, failed: Sequence[tuple[str, str]]) -> Path:
    """Write ``(path, reason)`` of each clip that could not be read into ``failed_clips.txt``.

    Args:
        output: folder.
        failed: clips; if there are none, a list of an earlier run is removed and no file is written.

    Returns:
        Path of the list.
    """
    path = output / FAILED
    path.unlink(missing_ok=True)
    if failed:
        write_text(path, "".join(f"{clip}\t{' '.join(reason.split())}\n" for clip, reason in failed))
    return path


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


def say_failed(failed: Sequence[tuple[str, str]], clips: int, path: Path) -> None:
    """Print the first of the clips that could not be read, if there are any.

    Args:
        failed: ``(path, reason)`` of each.
        clips: number of all clips.
        path: file that lists all failed clips.
    """
    if failed:
        print(f"\n{len(failed)} of {clips} clips could not be read and do not count:")
        for clip, reason in failed[:10]:
            print(f"  {reason if clip in reason else f'{clip}: {reason}'}")
        if len(failed) > 10:
            print(f"  and {len(failed) - 10} more, all listed in {path}")


def _csv_value(keep_rate: KeepRate) -> float | str:
    return keep_rate if isinstance(keep_rate, (int, float)) else keep_rate_text(keep_rate)


def _where(context: Mapping[str, Any]) -> str:
    fold = "" if context["fold"] is None else f", fold {context['fold']}"
    return f"{context['dataset']}, {context['split']}{fold}"


def _markdown(rows: Sequence[Row], metric: str) -> list[str]:
    others = ("mauc", "dprime") if metric == "map" else ("top5",)
    columns: list[Column] = [("keep-rate", "keep_rate", keep_rate_text)]
    for name in (metric, *others):
        columns.append((METRIC_NAMES[name], name, "{:.2%}".format if name in _PERCENT else "{:.3f}".format))
    columns += [("GMACs paper", "gmacs_paper", gmacs_text), ("GMACs computed", "gmacs_computed", gmacs_text)]
    if "clips_per_second" in rows[0]:
        columns.append(("clips/s", "clips_per_second", "{:.1f}".format))
        for key in rows[0]:
            if key.startswith("clips_per_second_"):
                columns.append((key.removeprefix("clips_per_second_"), key, "{:.1f}".format))
        columns.append(("saving", "saving", "{:.1%}".format))
    columns.append(("theory", "theory", "{:.1%}".format))
    if "clips_per_second" in rows[0]:
        columns.append(("realized", "realised", "{:.0%}".format))
    return markdown_lines(columns, rows)


def markdown_lines(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a Markdown table that is readable in a terminal.

    Args:
        columns: ``(head, key, format)`` of each column; ``format`` converts a value to text. None becomes a dash.
        rows: dicts of values.
    """

    def cell(value: Any, show: Callable[[Any], str]) -> str:
        return "-" if value is None else show(value)

    cells = [[head for head, _, _ in columns]] + [[cell(row[key], show) for _, key, show in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    text = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    return [text[0], "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|", *text[1:]]


def gmacs_text(value: float) -> str:
    """GMACs with about three digits."""
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"
