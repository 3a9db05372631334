"""Files that are either written completely or not at all."""

from __future__ import annotations

import csv
import json
import math
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypedDict

from .errors import UserError


class TextOptions(TypedDict):
    """Arguments of ``open`` and ``str.encode`` for text."""

    encoding: str
    errors: str


#: Options for text that may contain file names: the bytes of a name that is not UTF-8 become ``\\udcXX``.
TEXT: TextOptions = {"encoding": "utf-8", "errors": "backslashreplace"}


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path next to ``path``. When the block ends without an error, its file replaces ``path`` in one
    step.

    ::

        with atomic_write("last.pt") as temporary:
            torch.save(state, temporary)

    If anything fails (an exception in the block, a full disk, a kill), a file that was at ``path`` stays unchanged.
    Only a kill can leave the temporary file (hidden, ending in ``.tmp``) behind; it is safe to delete.

    Args:
        path: file to write; its folder must exist. A symbolic link is followed: its target is replaced.

    Yields:
        Path of an empty file in the same folder, to be overwritten.

    Raises:
        UserError: the file cannot be written (no such folder, no permission, read-only or full disk). Other exceptions
            from the block pass through unchanged.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        if target.is_dir():
            raise UserError(f"cannot write {path}: it is a folder; use the name of a file")
        with open(temporary, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode  # of the umask; safetensors creates files as 0600
        yield temporary
        os.chmod(temporary, mode & 0o777)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except Exception as error:
        reason = _write_failure(error)
        if reason is None:
            raise
        kept = " The existing file is unchanged." if target.is_file() else ""
        raise UserError(f"cannot write {path}: {reason}.{kept} Free some space or choose a writable folder") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_write_all(folder: str | os.PathLike[str], names: Iterable[str]) -> Iterator[dict[str, Path]]:
    """``atomic_write`` for several files of one folder: either all are replaced, or none.

    Args:
        folder: folder of the files. It is created if it does not exist.
        names: names of the files.

    Yields:
        A temporary path for each name.

    Raises:
        UserError: the folder cannot be created, or a file cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {folder}: {error.strerror}; choose another folder") from error
    with ExitStack() as files:
        yield {name: files.enter_context(atomic_write(folder / name)) for name in names}


def write_csv(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write dicts with the same keys as a CSV file with a header, atomically."""
    with atomic_write(path) as temporary, open(temporary, "w", newline="", **TEXT) as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _write_failure(error: Exception) -> str | None:
    """The reason why a file could not be written; None if the error has another cause."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    message = str(error)
    if "inline_container" in message:  # torch.save reports a short write as a wrong file position, without errno
        return f"the disk is full, or a quota or size limit is reached (torch.save: {message.splitlines()[0]})"
    if type(error).__name__ == "SafetensorError" and "I/O error" in message:
        return message.partition("I/O error: ")[2]
    return None


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power failure, if the file system allows it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_folder(path: Path) -> Path:
    """Create a folder for results and check that it is writable, before the long work.

    Raises:
        UserError: the folder cannot be created or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}; choose another folder with --output") from error
    return path


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write text atomically; bytes of file names that are not UTF-8 are escaped."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, **TEXT)


def write_lines(path: str | os.PathLike[str], lines: Iterable[object]) -> None:
    """Write lines of text atomically."""
    write_text(path, "".join(f"{line}\n" for line in lines))


def write_json(path: str | os.PathLike[str], values: Any) -> None:
    """Write values as indented JSON, atomically; numbers that are not finite become null."""
    write_text(path, json.dumps(json_values(values), indent=2) + "\n")


def json_values(value: Any) -> Any:
    """Replace numbers that JSON cannot hold (NaN and infinity) by None, also inside dicts, lists and tuples."""
    if isinstance(value, dict):
        return {key: json_values(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_values(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_locks: set[int] = set()  # descriptors of the locks that this process holds


@contextmanager
def locked(path: str | os.PathLike[str], remedy: str) -> Iterator[None]:
    """Hold an exclusive lock on an existing file or folder, so that no other process that locks it writes there.

    The lock ends with the block, or with the process if that is killed. Without support for locks in the operating
    system or the file system, nothing is locked.

    Raises:
        UserError: another process holds the lock; the message ends with ``remedy``.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    _locks.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: another process is writing there; wait until it ends, or {remedy}") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        _locks.discard(descriptor)
        os.close(descriptor)


def _close_locks() -> None:
    """Close the locks that a forked process inherits. It would hold them after its parent is killed."""
    while _locks:
        os.close(_locks.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_locks)
