"""Files of labels that grow clip by clip, and that the same command goes on with wherever it was stopped."""

import json
import os
import re
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ..errors import UserError
from ..files import atomic_write

#: A Parquet file cannot be added to, so that rows wait in memory for one of their own: for so many sets of labels (a
#: clip's, a window's), and for no longer than a kill may cost.
PART_LABELS, PART_SECONDS = 20_000, 300


class LabelFile:
    """Labels of clips in ``NAME.jsonl`` or in the folder ``NAME.parquet``; a context manager.

    Beside it lie ``PATH.about.json``, which says what the labels were made with, and ``PATH.failed.jsonl`` with
    ``path`` and ``error`` of the clips that failed when they were last tried, if any.

    Args:
        path: ``NAME.jsonl`` (an object for each clip, in the file as soon as it is added) or ``NAME.parquet`` (a folder
            of complete Parquet files, in which a clip is after ``PART_SECONDS`` at the latest). Its folder must exist.
        about: dict of what decides over the labels. ``checkpoint`` is noted, but may be another when work goes on.
        windows: whether rows have a ``windows`` column.

    Attributes:
        done: set of the paths that were in it before.
        failed: number of clips that failed since.

    Raises:
        UserError: it cannot be written, another process writes it, it holds labels of something else, or is damaged.
    """

    ADVICE = "the same command goes on"  # when it was stopped

    def __init__(self, path, about, *, windows=False):
        path = Path(path)
        check_label_path(path)
        self.failed_path = path.with_name(f"{path.name}.failed.jsonl")
        about_path = path.with_name(f"{path.name}.about.json")
        with ExitStack() as stack:  # what is undone when this, or the work, is over
            self._rows = JsonLines(path) if path.suffix == ".jsonl" else ParquetParts(path, windows)
            stack.callback(self._rows.close)
            stack.enter_context(_locked(path))
            self.done = self._rows.paths()
            if self.done:
                _check_same(path, about_path, about)
            else:
                with atomic_write(about_path) as temporary:
                    temporary.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
            self.failed_path.unlink(missing_ok=True)
            self.failed, self._failures = 0, None
            self._stack = stack.pop_all()

    def add(self, row):
        """Add a clip: the dict that ``Labeller.row`` gives."""
        self._rows.add(row)

    def fail(self, path, error):
        """Note that a clip failed; it is tried again when the work goes on."""
        if self._failures is None:
            self._failures = JsonLines(self.failed_path)
            self._stack.callback(self._failures.close)
        self._failures.add({"path": path, "error": error})
        self.failed += 1

    def failures(self):
        return f", listed in {self.failed_path}"

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return self._stack.__exit__(*exception)


class JsonLines:
    """A file of JSON objects, one in each line, which only ever holds whole ones."""

    def __init__(self, path):
        try:
            self.file = open(path, "ab", buffering=0)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; give another --output") from error
        self.path = path

    def paths(self):
        """The ``path`` of every row; a last one that a kill tore is cut off."""
        paths, end = set(), 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    paths.add(json.loads(line)["path"])
                except (ValueError, KeyError, TypeError):
                    raise UserError(
                        f"{self.path}, line {number}: not a clip's labels; remove the line, or give another --output"
                    ) from None
                end += len(line)
        self.file.truncate(end)
        return paths

    def add(self, row):
        end = os.fstat(self.file.fileno()).st_size
        try:
            rest = json_line(row).encode()
            while rest:  # a disk that is nearly full takes a part
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            with suppress(OSError):
                self.file.truncate(end)
            raise _cannot_write(self.path, error) from error

    def close(self):
        try:
            with self.file:
                os.fsync(self.file.fileno())
        except OSError as error:  # some file systems find out only now
            raise _cannot_write(self.path, error) from error


class ParquetParts:
    """A folder of Parquet files ``part-00000.parquet``, ..., each written as a whole; readers take it for one table."""

    def __init__(self, folder, windows):
        self._schema = label_schema(windows)
        try:
            folder.mkdir(exist_ok=True)
        except FileExistsError:
            raise UserError(f"cannot write {folder}: there is a file of that name; give another --output") from None
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error.strerror}; give another --output") from error
        self.folder = folder
        self._parts = sorted(folder.glob("*.parquet"))
        numbers = [int(found[1]) for part in self._parts if (found := re.fullmatch(r"part-(\d+)", part.stem))]
        self._next = max(numbers, default=-1) + 1
        self._rows, self._labels, self._since = [], 0, time.monotonic()

    def paths(self):
        """The ``path`` of every row."""
        import pyarrow
        from pyarrow import parquet

        paths = set()
        for part in self._parts:
            try:
                paths.update(parquet.ParquetFile(part).read(columns=["path"])["path"].to_pylist())
            except (pyarrow.ArrowException, KeyError) as error:
                reason = str(error).splitlines()[0]
                raise UserError(
                    f"{part}: no labels can be read from it ({reason}); remove it, and its clips are predicted again"
                ) from error
        return paths

    def add(self, row):
        self._rows.append(row)
        self._labels += 1 + len(row.get("windows", ()))
        if self._labels >= PART_LABELS or time.monotonic() - self._since > PART_SECONDS:
            self._write_part()

    def close(self):
        if self._rows:
            self._write_part()

    def _write_part(self):
        import pyarrow
        from pyarrow import parquet

        table = pyarrow.Table.from_pylist(self._rows, schema=self._schema)
        with atomic_write(self.folder / f"part-{self._next:05d}.parquet") as temporary:
            parquet.write_table(table, temporary)
        self._rows, self._labels, self._since, self._next = [], 0, time.monotonic(), self._next + 1


def label_schema(windows):
    """Arrow schema of the rows that ``Labeller.row`` gives."""
    try:
        import pyarrow
    except ImportError:
        raise UserError("Parquet needs pyarrow: pip install 'pruneattn[parquet]'") from None
    best = [("labels", pyarrow.list_(pyarrow.string())), ("scores", pyarrow.list_(pyarrow.float32()))]
    columns = [("path", pyarrow.string()), ("seconds", pyarrow.float64()), *best]
    if windows:
        window = pyarrow.struct([("start", pyarrow.float64()), ("end", pyarrow.float64()), *best])
        columns.append(("windows", pyarrow.list_(window)))
    return pyarrow.schema(columns)


def json_line(row):
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def check_label_path(path):
    """Refuse a name that no labels are written to, before the long work."""
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"--output {path}: the name must end in .jsonl or .parquet")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--output {path}: there is no folder {path.parent}")


def _check_same(path, about_path, about):
    try:
        before = json.loads(about_path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} holds labels, but {about_path} does not say of what; give another --output") from error
    found = [
        f"{name}: {before.get(name)} -> {about.get(name)}"
        for name in {**before, **about}
        if name != "checkpoint" and before.get(name) != about.get(name)
    ]
    if found:
        raise UserError(
            f"{path} holds labels that were made otherwise ({'; '.join(found)}); give another --output, or remove it"
        )


@contextmanager
def _locked(path):
    """Keep other processes from writing the same labels, where there are locks; a killed process holds none."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)  # also of a folder
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: another process is writing it; wait for that, or give another --output") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def _cannot_write(path, error):
    return UserError(
        f"cannot write {path}: {error.strerror}. What is in it stays: free some space and run the same command again"
    )
