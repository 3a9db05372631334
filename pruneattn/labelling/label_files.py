"""Label files that grow clip by clip, so that the same command resumes where it was stopped."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..files import atomic_write, locked

if TYPE_CHECKING:
    import pyarrow

#: Nothing can be appended to a Parquet file, so rows are collected in memory and written as a new part: after this many
#: sets of labels (of a clip or a window), or after this many seconds, the most work that a killed process can lose.
PART_LABELS, PART_SECONDS = 20_000, 300

#: A checkpoint may move (its SHA-256 is compared), and a label file outlives versions of the package.
_MAY_DIFFER = ("checkpoint", "pruneattn")


class LabelFile:
    """Labels of clips in ``NAME.jsonl`` or in the folder ``NAME.parquet``; a context manager.

    Two files are written next to it: ``PATH.about.json`` describes the model and the options that made the labels, and
    ``PATH.failed.jsonl`` has ``path`` and ``error`` of the clips that failed in the last run, if any did.

    Args:
        path: ``NAME.jsonl`` (one object for each clip, written as soon as it is added) or ``NAME.parquet`` (a folder
            of complete Parquet files; a clip is written after ``PART_SECONDS`` at the latest). Its folder must exist.
        about: dict of the values that determine the labels. ``checkpoint`` and ``pruneattn`` (the version) are
            recorded, but they may differ when a file is continued.
        windows: whether rows have a ``windows`` column.

    Attributes:
        done: set of the paths that the file held when it was opened.
        failed: number of clips that have failed since.

    Raises:
        UserError: the file cannot be written, is being written by another process, holds labels that were made with
            other values of ``about``, or is damaged.
    """

    ADVICE = "run the same command again to resume"  # printed after a stop

    done: set[str]
    _rows: JsonLines | ParquetParts
    failed: int

    def __init__(self, path: str | os.PathLike, about: Mapping[str, Any], *, windows: bool = False) -> None:
        path = Path(path)
        check_label_path(path)
        self.failed_path = path.with_name(f"{path.name}.failed.jsonl")
        about_path = path.with_name(f"{path.name}.about.json")
        with ExitStack() as stack:  # closes everything if the constructor fails, else in __exit__
            _create(path, windows)
            # The lock comes first and ends last: it covers the numbers of the parts and the last part.
            stack.enter_context(locked(path, "use another --output"))
            self._rows = JsonLines(path) if path.suffix == ".jsonl" else ParquetParts(path, windows)
            stack.callback(self._rows.close)
            self.done = self._rows.paths()
            if self.done:
                _check_same(path, about_path, about)
            else:
                with atomic_write(about_path) as temporary:
                    temporary.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
            self.failed_path.unlink(missing_ok=True)
            self.failed = 0
            self._failures: JsonLines | None = None
            self._stack = stack.pop_all()

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a clip as the dict that ``Labeler.row`` returns."""
        self._rows.add(row)

    def fail(self, path: str, error: str) -> None:
        """Record that a clip failed. The next run tries it again."""
        if self._failures is None:
            self._failures = JsonLines(self.failed_path)
            self._stack.callback(self._failures.close)
        self._failures.add({"path": path, "error": error})
        self.failed += 1

    def failures(self) -> str:
        """End of the sentence that counts the failed clips."""
        return f", listed in {self.failed_path}"

    def __enter__(self) -> LabelFile:
        return self

    def __exit__(self, *exception: Any) -> bool | None:
        return self._stack.__exit__(*exception)


class JsonLines:
    """A file with one JSON object in each line, all of them complete."""

    def __init__(self, path: Path) -> None:
        try:
            self.file = open(path, "ab", buffering=0)  # noqa: SIM115, closed by close()
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; use another --output") from error
        self.path = path

    def paths(self) -> set[str]:
        """The ``path`` of every row. A last line that is incomplete, because the process was killed, is removed."""
        paths: set[str] = set()
        end = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    paths.add(json.loads(line)["path"])
                except (ValueError, KeyError, TypeError):
                    raise UserError(
                        f"{self.path}, line {number}: not the labels of a clip; remove it, or use another --output"
                    ) from None
                end += len(line)
        self.file.truncate(end)
        return paths

    def add(self, row: Mapping[str, Any]) -> None:
        end = os.fstat(self.file.fileno()).st_size
        try:
            rest = json_line(row).encode()
            while rest:  # a disk that is nearly full accepts only a part
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            with suppress(OSError):
                self.file.truncate(end)
            raise _cannot_write(self.path, error) from error

    def close(self) -> None:
        try:
            with self.file:
                os.fsync(self.file.fileno())
        except OSError as error:  # some file systems report errors only now
            raise _cannot_write(self.path, error) from error


class ParquetParts:
    """A folder of complete Parquet files ``part-00000.parquet``, ..., which readers open as one table."""

    def __init__(self, folder: Path, windows: bool) -> None:
        self._schema = label_schema(windows)
        self.folder = folder
        self._parts = sorted(folder.glob("*.parquet"))
        numbers = [int(found[1]) for part in self._parts if (found := re.fullmatch(r"part-(\d+)", part.stem))]
        self._next = max(numbers, default=-1) + 1
        self._rows: list[Mapping[str, Any]] = []
        self._labels, self._since = 0, time.monotonic()

    def paths(self) -> set[str]:
        """The ``path`` of every row."""
        import pyarrow
        from pyarrow import parquet

        paths: set[str] = set()
        for part in self._parts:
            try:
                paths.update(parquet.ParquetFile(part).read(columns=["path"])["path"].to_pylist())
            except (pyarrow.ArrowException, KeyError) as error:
                reason = str(error).splitlines()[0]
                raise UserError(
                    f"{part}: not a readable label file ({reason}); remove it, and its clips are labeled again"
                ) from error
        return paths

    def add(self, row: Mapping[str, Any]) -> None:
        self._rows.append(row)
        self._labels += 1 + len(row.get("windows", ()))
        if self._labels >= PART_LABELS or time.monotonic() - self._since > PART_SECONDS:
            self._write_part()

    def close(self) -> None:
        if self._rows:
            self._write_part()

    def _write_part(self) -> None:
        import pyarrow
        from pyarrow import parquet

        table = pyarrow.Table.from_pylist(self._rows, schema=self._schema)
        with atomic_write(self.folder / f"part-{self._next:05d}.parquet") as temporary:
            parquet.write_table(table, temporary)
        self._rows, self._labels, self._since, self._next = [], 0, time.monotonic(), self._next + 1


def label_schema(windows: bool) -> pyarrow.Schema:
    """Arrow schema of the rows that ``Labeler.row`` returns."""
    try:
        import pyarrow
    except ImportError:
        raise UserError("pyarrow, which writes Parquet, is not installed: pip install 'pruneattn[parquet]'") from None
    best = [("labels", pyarrow.list_(pyarrow.string())), ("scores", pyarrow.list_(pyarrow.float32()))]
    columns = [("path", pyarrow.string()), ("seconds", pyarrow.float64()), *best]
    if windows:
        window = pyarrow.struct([("start", pyarrow.float64()), ("end", pyarrow.float64()), *best])
        columns.append(("windows", pyarrow.list_(window)))
    return pyarrow.schema(columns)


def json_line(row: Mapping[str, Any]) -> str:
    """A row as one line of JSON."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def check_label_path(path: Path) -> None:
    """Raise a ``UserError`` if labels cannot be written to a file of this name. Call it before long work."""
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"--output {path}: the name must end in .jsonl or .parquet")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--output {path}: the folder {path.parent} does not exist")


def _check_same(path: Path, about_path: Path, about: Mapping[str, Any]) -> None:
    try:
        before = json.loads(about_path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} holds labels, but {about_path}, which describes them, cannot be read; use another --output"
        ) from error
    found = [
        f"{name}: {before.get(name)} -> {about.get(name)}"
        for name in {**before, **about}
        if name not in _MAY_DIFFER and before.get(name) != about.get(name)
    ]
    if found:
        raise UserError(
            f"{path} contains labels that were made with other settings ({'; '.join(found)}); use another --output"
        )


def _create(path: Path, windows: bool) -> None:
    """Create an empty label file, unless it exists."""
    if path.suffix == ".jsonl":
        JsonLines(path).file.close()
        return
    label_schema(windows)  # raises without pyarrow
    try:
        path.mkdir(exist_ok=True)
    except FileExistsError:
        raise UserError(f"cannot write {path}: it is a file, not a folder; use another --output") from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; use another --output") from error


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write {path}: {error.strerror}. Its labels are kept: free some space and run the same command again"
    )
