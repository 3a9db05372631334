"""The clips of a corpus: found in folders and lists, and decoded in order by any number of processes."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..constants import SAMPLE_RATE
from ..data import load_audio
from ..data.decode import decoding_error
from ..data.manifest import csv_table, here_or_below, list_folders, read_entries, read_text
from ..data.search import left_out, search_audio, unsupported_reason
from ..errors import UserError
from ..files import TEXT
from .long_clips import LONGEST_SECONDS, LongClip, decoding_context

# Decoded samples that may wait for the model, 17 minutes or 64 MB; but at least one clip for each process.
_WAITING = 1 << 24
# Lists that other programs write, by suffix.
_OTHER_LISTS = {
    **dict.fromkeys((".scp", ".ark"), "a file of Kaldi"),
    **dict.fromkeys((".jsonl", ".ndjson"), "JSON lines"),
    **dict.fromkeys((".tsv", ".tab"), "a table with tabs between the columns"),
    **dict.fromkeys((".lst", ".list", ".flist", ".m3u", ".m3u8", ".pls"), "a list of files"),
    **dict.fromkeys((".yaml", ".yml", ".toml", ".xml"), "a structured text file"),
    **dict.fromkeys((".parquet", ".arrow", ".feather", ".pkl", ".npy", ".npz", ".xlsx", ".xls", ".ods"), "a table"),
}
_log = logging.getLogger(__name__)


class Decoded(NamedTuple):
    """A decoded clip, or the error for which it could not be decoded."""

    path: str
    # float32 [L] at 16 kHz; a tensor would be passed between processes through a file
    wave: np.ndarray | LongClip | None
    error: str | None  # None if there is a wave


def find_clips(
    inputs: Iterable[str | Path], data_dir: str | Path | None = None
) -> tuple[list[str], list[tuple[str, str]]]:
    """Find clips in files, folders and lists: each clip once, in the given order.

    Args:
        inputs: audio files; folders, which are searched for audio files; AST-style manifests (``.json``), with or
            without labels; lists of paths: ``.txt`` with one path in each line, ``.csv`` with a column ``path``, or
            ``-`` for lines on standard input.
        data_dir: folder to which relative paths in a list refer. Without it they refer to the folder of the list or its
            parent, and those on standard input to the current folder.

    Returns:
        ``(paths, failed)``: list of paths, and list of ``(path, reason)`` of inputs without usable clips and of the
        sound files in folders that libsndfile cannot decode.

    Raises:
        UserError: a list cannot be read, is empty or has another format.
    """
    paths: dict[str, None] = {}
    failed: list[tuple[str, str]] = []
    for given in inputs:
        suffix = Path(given).suffix.lower()
        if os.path.isdir(given):
            unreadable: list[OSError] = []
            search = search_audio(given, onerror=unreadable.append)
            found = [str(path) for path in search.clips]
            failed += [(str(error.filename), f"cannot be read: {error.strerror}") for error in unreadable]
            failed += [(str(path), unsupported_reason(path)) for path in search.unsupported]
            for note in left_out(search._replace(unsupported=[])):
                _log.warning("%s: %s", given, note)
            if not found and not unreadable and not search.unsupported:
                failed.append((str(given), "this folder contains no audio files"))
        elif str(given) == "-":
            names = _lines(os.fsdecode(sys.stdin.buffer.read()))
            found = _located(names, [data_dir or "", ""], "standard input")
        elif suffix in _READERS:
            file = here_or_below(data_dir, given)
            found = _located(_READERS[suffix](file), list_folders(file, data_dir), file)
        elif suffix in _OTHER_LISTS:
            raise UserError(
                f"{given}: {_OTHER_LISTS[suffix]} ({suffix}), not a sound file or a list of clips that can be read; "
                "write the paths of the clips into a .txt file with one path in each line, or a .csv file with a "
                "column named path"
            )
        else:
            found = [str(given)]  # decoding reports a missing or damaged file
        paths.update(dict.fromkeys(found))
    for path in list(paths):
        try:
            path.encode()
        except UnicodeEncodeError:  # JSON and Parquet could not hold the name
            failed.append((path, "the file name is not UTF-8: rename the file"))
            del paths[path]
    return list(paths), [(path.encode(**TEXT).decode(), reason) for path, reason in failed]


def decode(path: str, *, whole: bool = False) -> Decoded:
    """Decode one clip. A clip that cannot be decoded is returned with its error.

    A clip of more than ``LONGEST_SECONDS`` is returned as a ``LongClip``, unless ``whole`` asks for all its samples.
    """
    try:
        if whole:
            return Decoded(path, load_audio(path).numpy(), None)
        wave = load_audio(path, seconds=LONGEST_SECONDS + 1).numpy()
        if len(wave) > LONGEST_SECONDS * SAMPLE_RATE:
            return Decoded(path, LongClip(path, apart=multiprocessing.parent_process() is not None), None)
        return Decoded(path, wave, None)
    except Exception as error:  # no clip may end the work on all other clips
        return Decoded(path, None, decoding_error(path, error))


def decode_clips(paths: Iterable[str], workers: int, ahead: int) -> Iterator[Decoded]:
    """Decode clips in other processes, in order.

    If a process crashes or is killed, the clips that were in flight are decoded again, each in a separate process.
    Only a clip that crashes its own process is returned with an error.

    Args:
        paths: iterable of str.
        workers: number of processes; 0 decodes in this process.
        ahead: clips that may be in flight at the same time, so that the processes decode while the model runs.

    Yields:
        ``Decoded``, the same for any number of workers.
    """
    if workers == 0:
        yield from map(decode, paths)
        return
    paths, pool = iter(paths), _pool(workers)
    flying: deque[tuple[str, Future[Decoded]]] = deque()  # in order
    longest = 0  # samples
    try:
        while True:
            room = max(workers, min(ahead, _WAITING // longest)) if longest else workers
            for path in islice(paths, max(0, room - len(flying))):
                try:
                    future = pool.submit(decode, path)
                except BrokenProcessPool:
                    pool = _pool(workers)
                    future = pool.submit(decode, path)
                flying.append((path, future))
            if not flying:
                return
            path, future = flying.popleft()
            try:
                clip = future.result()
            except BrokenProcessPool:
                clip = _decode_alone(path)
            except Exception as error:  # such as no memory to pass the clip between processes
                clip = Decoded(path, None, decoding_error(path, error))
            longest = max(longest, len(clip.wave) if isinstance(clip.wave, np.ndarray) else 0)
            yield clip
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _decode_alone(path: str) -> Decoded:
    with _pool(1) as pool:
        try:
            return pool.submit(decode, path).result()
        except BrokenProcessPool:
            return Decoded(path, None, "its decoding process crashed or was killed, maybe for lack of memory")


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=decoding_context(), initializer=_start_worker)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the main process stops the workers
    parent = multiprocessing.parent_process()
    assert parent is not None
    # Without this thread the process would wait for work forever after the main process is killed.
    threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _manifest_paths(path: Path) -> list[str]:
    return [entry["wav"] for entry in read_entries(path, ("wav",))]


def _text_paths(path: Path) -> list[str]:
    return _lines(read_text(path, "list of clips"))


def _csv_paths(path: Path) -> list[str]:
    columns, rows = csv_table(path, "list of clips")
    if "path" not in columns:
        found = ", ".join(repr(column) for column in columns[:5]) or "nothing"
        raise UserError(f"{path}, line 1: a CSV list of clips needs a column named path, between commas; found {found}")
    return [row["path"] for _, row in rows if row.get("path", "").strip()]


_READERS: dict[str, Callable[[Path], list[str]]] = {".json": _manifest_paths, ".txt": _text_paths, ".csv": _csv_paths}


def _lines(text: str) -> list[str]:
    return [line for line in (line.rstrip("\r") for line in text.split("\n")) if line.strip()]


def _located(names: Sequence[str], folders: Sequence[str | os.PathLike], where: str | os.PathLike) -> list[str]:
    """Path of each file: in the first of the folders that contains it, else in the first folder.

    ``where`` names the list in messages.
    """
    if not names:
        raise UserError(f"{where} contains no paths of clips; add at least one")
    for number, name in enumerate(names, 1):
        if "\0" in name:
            raise UserError(
                f"{where}: path {number} contains a NUL byte; write the list as UTF-8 text with one path in each line"
            )

    def locate(name: str) -> str:
        places = [str(Path(folder, name)) for folder in folders]
        return next(filter(os.path.isfile, places), places[0])

    return [locate(name) for name in names]
