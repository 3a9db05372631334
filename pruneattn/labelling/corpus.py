"""The clips of a corpus: found by name in folders and lists, decoded in order by any number of processes."""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..data.manifest import csv_table, here_or_below, list_folders, read_entries, read_text
from ..errors import UserError
from ..files import TEXT

# Samples of decoded sound that may wait for the model, 17 minutes or 64 MB; but at least one clip for each process.
_WAITING = 1 << 24


class Decoded(NamedTuple):
    """A clip on its way to the model."""

    path: str
    wave: np.ndarray | None  # float32 [L] at 16 kHz; not a tensor, which would go to another process by a file
    error: str | None  # why there is none


def find_clips(inputs, data_dir=None):
    """The clips that the command line names, each once, in the order given.

    Args:
        inputs: sound files; folders, which are searched for them; AST-style manifests (``.json``), whose labels may be
            absent; lists of paths: ``.txt`` with one in each line, ``.csv`` with a column ``path``, or ``-`` for lines
            on standard input.
        data_dir: folder from which relative paths in a list count; else they count from the list's folder or that
            folder's parent, or from here if they come on standard input.

    Returns:
        ``(paths, failed)``: list of str, and list of ``(path, reason)`` of what holds or can be no clip.
    """
    from ..data import find_audio

    paths, failed = {}, []
    for given in inputs:
        suffix = Path(given).suffix.lower()
        if os.path.isdir(given):
            unreadable = []
            found = [str(path) for path in find_audio(given, onerror=unreadable.append)]
            failed += [(str(error.filename), f"cannot be read: {error.strerror}") for error in unreadable]
            if not found and not unreadable:
                failed.append((str(given), "no sound files in this folder"))
        elif str(given) == "-":
            names = _lines(os.fsdecode(sys.stdin.buffer.read()))
            found = _located(names, [data_dir or "", ""], "standard input")
        elif suffix in _READERS:
            file = here_or_below(data_dir, given)
            found = _located(_READERS[suffix](file), list_folders(file, data_dir), file)
        else:
            found = [str(given)]  # decoding tells whether it is there and sound
        paths.update(dict.fromkeys(found))
    for path in list(paths):
        try:
            path.encode()
        except UnicodeEncodeError:  # neither JSON nor Parquet could name it
            failed.append((path.encode(**TEXT).decode(), "its name is not UTF-8: rename it"))
            del paths[path]
    return list(paths), failed


def decode(path):
    """Decode one clip; one that cannot be decoded comes back with its error."""
    from ..data import load_audio

    try:
        return Decoded(path, load_audio(path).numpy(), None)
    except (UserError, OSError) as error:
        return Decoded(path, None, str(error))


def decode_clips(paths, workers, ahead):
    """Decode clips in other processes, in order.

    A process that a clip brings down, or that is killed, costs nothing: what was on its way is decoded again, each clip
    in a process of its own, and only a clip that brings that down too comes back with an error.

    Args:
        paths: iterable of str.
        workers: processes; 0 decodes in this one.
        ahead: clips that may be on their way at once, so that the processes work while the model does.

    Yields:
        ``Decoded``, the same with any number of workers.
    """
    if workers == 0:
        yield from map(decode, paths)
        return
    paths, pool = iter(paths), _pool(workers)
    flying, longest = deque(), 0  # (path, future) in order; samples
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
            longest = max(longest, 0 if clip.wave is None else len(clip.wave))
            yield clip
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _decode_alone(path):
    with _pool(1) as pool:
        try:
            return pool.submit(decode, path).result()
        except BrokenProcessPool:
            return Decoded(path, None, "the process that decoded it crashed or was killed (not enough memory?)")


def _pool(workers):
    # Forked from a server that has nothing but the decoder: this process may have threads and a GPU, which no fork
    # survives, and files of its own, which no fork should keep open.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    context.set_forkserver_preload(["pruneattn.data"])
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)


def _start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the main one ends the others
    parent = multiprocessing.parent_process()
    # Else the process would wait for work for ever when the main one is killed.
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _manifest_paths(path):
    return [entry["wav"] for entry in read_entries(path, ("wav",))]


def _text_paths(path):
    return _lines(read_text(path, "list of clips"))


def _csv_paths(path):
    columns, rows = csv_table(path, "list of clips")
    if "path" not in columns:
        raise UserError(f"{path}, line 1: a CSV list of clips needs a column with the name path")
    return [row["path"] for _, row in rows if row.get("path", "").strip()]


_READERS = {".json": _manifest_paths, ".txt": _text_paths, ".csv": _csv_paths}


def _lines(text):
    return [line for line in (line.rstrip("\r") for line in text.split("\n")) if line.strip()]


def _located(names, folders, where):
    """Paths of the files with these names: in the first of the folders that has it, else in the first of all.

    ``where`` the names stand, for messages.
    """
    if not names:
        raise UserError(f"{where} names no clips; add the path of one")
    for number, name in enumerate(names, 1):
        if "\0" in name:
            raise UserError(f"{where}: path {number} has a NUL byte; write it as UTF-8 text with one path in each line")

    def locate(name):
        places = [str(Path(folder, name)) for folder in folders]
        return next(filter(os.path.isfile, places), places[0])

    return [locate(name) for name in names]
