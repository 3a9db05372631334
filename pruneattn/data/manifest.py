"""AST-style manifests: a JSON file of clips and a CSV of labels."""

import csv
import io
import json
from pathlib import Path

from ..errors import UserError
from .clips import Clip

FORMAT = '{"data": [{"wav": "audio/a.wav", "labels": "/m/09x0r,/m/05zppz"}, ...]}'


def read_text(path, what):
    """Text of a UTF-8 file, with or without byte order mark; ``what`` it is, for messages."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: there is no such {what}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a {what}: byte {error.start} is not UTF-8 text") from None


def csv_rows(path, what, **options):
    """``(line number, fields)`` of each row of a CSV file that is not empty; ``what`` it is, for messages."""
    rows = csv.reader(io.StringIO(read_text(path, what)), **options)
    try:
        yield from ((rows.line_num, row) for row in rows if row)
    except csv.Error as error:  # a field over 128 KB
        raise UserError(f"{path}, line {rows.line_num}: not CSV ({error}); is a quotation mark left open?") from None


def csv_table(path, what):
    """``(columns, rows)`` of a CSV file with a header; rows: ``(line number, dict)`` without what a row lacks."""
    rows = csv_rows(path, what)
    _, columns = next(rows, (1, []))
    return columns, ((line, dict(zip(columns, row))) for line, row in rows)


def read_label_csv(path):
    """Read a label CSV with the columns ``index,mid,display_name``, such as AudioSet's class_labels_indices.csv.

    Returns:
        ``(numbers, names)``: dict from label id (``mid``) to class number, and the display names by class number.
    """
    columns, rows = csv_table(path, "label CSV")
    if not {"index", "mid", "display_name"} <= {*columns}:
        raise UserError(f"{path}, line 1: a label CSV starts with the columns index,mid,display_name")
    numbers, names = {}, {}
    for line, row in rows:
        where = f"{path}, line {line}"
        index, mid, name = (row.get(column) for column in ("index", "mid", "display_name"))
        if not (index or "").isdecimal() or not mid or not name:
            raise UserError(f"{where}: expected a number, a label and a name (index,mid,display_name)")
        index = int(index)
        if mid in numbers or index in names:
            raise UserError(f"{where}: label {mid} or index {index} stands there twice; keep one of them")
        numbers[mid], names[index] = index, name
    if sorted(names) != list(range(len(names))) or not names:
        raise UserError(f"{path}: the index column has to count 0, 1, 2, ... without a gap ({len(names)} rows)")
    return numbers, [names[index] for index in range(len(names))]


def _parse_json(path):
    text = read_text(path, "manifest")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}, line {error.lineno}"
        # The parser stops exactly at the comment: it skips nothing but white space.
        if text.startswith(("//", "/*", "#"), error.pos):
            line = text.splitlines()[error.lineno - 1]
            own_line = line.lstrip() == text[error.pos :].split("\n", 1)[0].rstrip("\r")
            what = f"line {error.lineno}" if own_line else f"the comment in line {error.lineno}"
            raise UserError(f"{where}: JSON has no comments: remove {what} ({line.strip()[:60]!r})") from None
        raise UserError(f"{where}, column {error.colno}: not JSON: {error.msg}") from None


def list_folders(path, root=None):
    """Where relative paths in a manifest or other list of files may count from: ``root``, its folder, its parent."""
    return ([Path(root)] if root else []) + [Path(path).parent, Path(path).parent.parent]


def here_or_below(root, path):
    """A path that counts from here or, where there is nothing, from ``root`` (which may be None)."""
    return Path(root) / path if root and not Path(path).exists() and (Path(root) / path).exists() else Path(path)


def read_entries(path, keys):
    """The entries of a manifest: a list of dicts in each of which the ``keys`` stand with a text."""
    content = _parse_json(path)
    entries = content.get("data") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise UserError(f"{path}: not a manifest; expected {FORMAT}")
    if not entries:
        raise UserError(f'{path}: the manifest lists no clips ("data" is empty)')
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in keys):
            needed = " and ".join(f'"{key}"' for key in keys)
            raise UserError(f'{path}: entry {number} of "data" needs the texts {needed}; expected {FORMAT}')
    return entries


def read_manifest(path, numbers, label_csv, find):
    """Read the clips of a manifest.

    Args:
        path: JSON file of the form ``FORMAT``.
        numbers: dict from label id to class number.
        label_csv: Where ``numbers`` comes from, for messages.
        find: ``find(wav)`` gives the path of a file that is there, or None.

    Returns:
        ``(clips, missing)``: the clips whose file is there, and the ``wav`` entries of the others.
    """
    clips, missing = [], []
    for entry in read_entries(path, ("wav", "labels")):
        wav = entry["wav"]
        labels = [label.strip() for label in entry["labels"].split(",") if label.strip()]
        if not labels:
            raise UserError(f"{path}: clip {wav} has no label; give it one or remove it")
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
