"""AST-style manifests: a JSON file of clips and a CSV of labels."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from .clips import Clip

PathLike = str | Path

FORMAT = '{"data": [{"wav": "audio/a.wav", "labels": "/m/09x0r,/m/05zppz"}, ...]}'


def read_text(path: PathLike, what: str) -> str:
    """Text of a UTF-8 file, with or without a byte order mark. ``what`` names the kind of file in messages."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: no such {what}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a {what}: byte {error.start} is not UTF-8 text") from None


def csv_rows(path: PathLike, what: str, **options: Any) -> Iterator[tuple[int, list[str]]]:
    """``(line number, fields)`` of each row of a CSV file that is not empty. ``what`` is for messages."""
    rows = csv.reader(io.StringIO(read_text(path, what)), **options)
    try:
        yield from ((rows.line_num, row) for row in rows if row)
    except csv.Error as error:  # a field over 128 KB
        raise UserError(f"{path}, line {rows.line_num}: not CSV ({error}); is a quotation mark not closed?") from None


def csv_table(path: PathLike, what: str) -> tuple[list[str], Iterator[tuple[int, dict[str, str]]]]:
    """``(columns, rows)`` of a CSV file with a header; each row is ``(line number, dict)``, without absent fields."""
    rows = csv_rows(path, what)
    columns = next(rows, (1, list[str]()))[1]
    return columns, ((line, dict(zip(columns, row))) for line, row in rows)


def read_label_csv(path: PathLike) -> tuple[dict[str, int], list[str]]:
    """Read a label CSV with the columns ``index,mid,display_name``, such as AudioSet's class_labels_indices.csv.

    Returns:
        ``(numbers, names)``: dict from label ID (``mid``) to class number, and list of display names by class number.
    """
    columns, rows = csv_table(path, "label CSV")
    if not {"index", "mid", "display_name"} <= {*columns}:
        raise UserError(f"{path}, line 1: a label CSV needs the columns index,mid,display_name")
    numbers: dict[str, int] = {}
    names: dict[int, str] = {}
    for line, row in rows:
        where = f"{path}, line {line}"
        text, mid, name = (row.get(column, "") for column in ("index", "mid", "display_name"))
        if not text.isdecimal() or not mid or not name:
            raise UserError(f"{where}: expected a number, a label and a name (index,mid,display_name)")
        index = int(text)
        if mid in numbers or index in names:
            raise UserError(f"{where}: label {mid} or index {index} appears twice; remove one of the rows")
        numbers[mid], names[index] = index, name
    if sorted(names) != list(range(len(names))) or not names:
        raise UserError(f"{path}: the index column must count 0, 1, 2, ... without gaps ({len(names)} rows)")
    return numbers, [names[index] for index in range(len(names))]


def _parse_json(path: PathLike) -> Any:
    text = read_text(path, "manifest")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}, line {error.lineno}"
        # The parser stops exactly at the comment, because it skips only white space.
        if text.startswith(("//", "/*", "#"), error.pos):
            line = text.splitlines()[error.lineno - 1]
            own_line = line.lstrip() == text[error.pos :].split("\n", 1)[0].rstrip("\r")
            what = f"line {error.lineno}" if own_line else f"the comment in line {error.lineno}"
            raise UserError(f"{where}: JSON has no comments: remove {what} ({line.strip()[:60]!r})") from None
        raise UserError(f"{where}, column {error.colno}: not JSON: {error.msg}") from None


def list_folders(path: PathLike, root: PathLike | None = None) -> list[Path]:
    """Folders to which relative paths in a list of files may refer: ``root``, the list's folder, and its parent."""
    return ([Path(root)] if root else []) + [Path(path).parent, Path(path).parent.parent]


def here_or_below(root: PathLike | None, path: PathLike) -> Path:
    """A path relative to the current folder or, if it does not exist there, to ``root`` (which may be None)."""
    return Path(root) / path if root and not Path(path).exists() and (Path(root) / path).exists() else Path(path)


def read_entries(path: PathLike, keys: Sequence[str]) -> list[dict[str, str]]:
    """The entries of a manifest: a list of dicts that all have the ``keys`` with a string."""
    content = _parse_json(path)
    entries = content.get("data") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise UserError(f"{path}: not a manifest; expected {FORMAT}")
    if not entries:
        raise UserError(f'{path}: the manifest lists no clips ("data" is empty)')
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in keys):
            needed = " and ".join(f'"{key}"' for key in keys)
            raise UserError(f'{path}: entry {number} of "data" needs the strings {needed}; expected {FORMAT}')
    return entries


def read_manifest(
    path: PathLike, numbers: Mapping[str, int], label_csv: PathLike, find: Callable[[str], Path | None]
) -> tuple[list[Clip], list[str]]:
    """Read the clips of a manifest.

    Args:
        path: JSON file of the form ``FORMAT``.
        numbers: dict from label ID to class number.
        label_csv: file that ``numbers`` comes from, for messages.
        find: ``find(wav)`` returns the path of an existing file, or None.

    Returns:
        ``(clips, missing)``: the clips whose file exists, and the ``wav`` entries of all other clips.
    """
    clips: list[Clip] = []
    missing: list[str] = []
    for entry in read_entries(path, ("wav", "labels")):
        wav = entry["wav"]
        labels = [label.strip() for label in entry["labels"].split(",") if label.strip()]
        if not labels:
            raise UserError(f"{path}: clip {wav} has no label; add a label or remove the clip")
        for label in labels:
            if label not in numbers:
                raise UserError(
                    f"{path}: label {label} of clip {wav} is not in {label_csv}; add it there or correct the manifest"
                )
        file = find(wav)
        if file is None:
            missing.append(wav)
        else:
            clips.append(Clip(file, tuple(sorted({numbers[label] for label in labels}))))
    return clips, missing
