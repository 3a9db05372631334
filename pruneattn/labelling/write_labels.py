"""Write labels to an output, with progress, a clean stop and a summary."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from tqdm import tqdm

from ..runtime.signals import StopRequest
from .deadline import Deadline
from .label_files import LabelFile, json_line


def write_labels(rows: Iterable[Mapping[str, Any]], total: int, output: LabelFile | Terminal) -> int:
    """Write labels to an output as they arrive, show progress, and print a summary.

    Ctrl-C and SIGTERM stop it between two clips. If the clip in progress does not end soon, because a read is blocked,
    they end the process (``deadline``). Labels that are ready are written in any case, also after an error.

    Args:
        rows: iterable of the dicts that ``Labeler.row`` returns.
        total: number of clips in ``rows``.
        output: ``LabelFile`` or ``Terminal``; it is closed at the end, also after an error.

    Returns:
        The exit code: 0; 1 if no clip has labels; 128 + the number of the signal that stopped it.
    """
    start, added, seconds = time.perf_counter(), 0, 0.0
    if output.done:
        print(f"{len(output.done)} clips are already labeled; {total} remain", file=sys.stderr)
    bar = tqdm(total=total, desc="predict", unit="clip", disable=None if total > 1 else True, leave=False)
    finish = partial(output.__exit__, None, None, None)
    with output, StopRequest() as stop, Deadline(finish, output.ADVICE) as deadline, bar:
        for row in rows:
            with deadline.lock:
                if "error" in row:
                    output.fail(row["path"], row["error"])
                    bar.set_postfix(failed=output.failed, refresh=False)
                else:
                    output.add(row)
                    added, seconds = added + 1, seconds + row["seconds"]
                bar.update()
            if stop.signum:
                break
    took = time.perf_counter() - start
    if total > 1:
        print(
            f"{added} {'clip' if added == 1 else 'clips'} with {seconds / 3600:.2f} hours of audio in {took:.0f} s: "
            f"{added / took:.1f} clips/s, {seconds / took:.0f} times real time",
            file=sys.stderr,
        )
    if output.failed:
        print(
            f"{output.failed} of {added + output.failed} clips could not be labeled{output.failures()}", file=sys.stderr
        )
    if stop.signum:
        print(f"stopped by {signal.Signals(stop.signum).name}; {output.ADVICE}", file=sys.stderr)
        return 128 + stop.signum
    return 0 if added or output.done else 1


class Terminal:
    """Labels on standard output, as text or as JSON lines."""

    ADVICE = "use --output FILE.jsonl to be able to resume"
    done: frozenset[str] = frozenset()

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._failures: list[str] = []

    @property
    def failed(self) -> int:
        """Number of clips that have failed."""
        return len(self._failures)

    def add(self, row: Mapping[str, Any]) -> None:
        """Print a clip as the dict that ``Labeler.row`` returns."""
        text = json_line(row) if self._as_json else label_text(row)
        tqdm.write(text.removesuffix("\n"), file=sys.stdout)  # does not break the progress bar

    def fail(self, path: str, error: str) -> None:
        """Record that a clip failed."""
        self._failures.append(error if path in error else f"{path}: {error}")

    def failures(self) -> str:
        """The failed clips, one in each line, as the end of the sentence that counts them."""
        return "".join(f"\n  {line}" for line in self._failures).replace("\n", ":\n", 1)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exception: Any) -> None:
        sys.stdout.flush()


def label_text(row: Mapping[str, Any]) -> str:
    """A row with ``windows`` as lines for the terminal."""
    windows = len(row["windows"])
    length = f"{row['seconds']:.2f} s" + (f", mean of {windows} windows" if windows > 1 else "")
    best = [f"  {score:.4f}  {label}" for label, score in zip(row["labels"], row["scores"])]
    return "\n".join([f"{row['path']} ({length})", *best])
