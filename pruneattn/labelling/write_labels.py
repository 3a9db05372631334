"""From rows to an output: progress, stopping in the middle, and what is said in the end."""

import signal
import sys
import time

from tqdm import tqdm

from ..runtime.signals import StopRequest
from .label_files import json_line


def write_labels(rows, total, output):
    """Put labels into an output as they come, show progress, and say at the end how it went.

    Ctrl-C and SIGTERM stop it between two clips.

    Args:
        rows: iterable of the dicts that ``Labeller.row`` gives.
        total: number of clips that will come.
        output: ``LabelFile`` or ``Terminal``; closed in the end, whatever happens.

    Returns:
        The exit code: 0, 1 if there is not one label, or 128 + the number of the signal that stopped it.
    """
    start, added, seconds = time.perf_counter(), 0, 0.0
    if output.done:
        print(f"{len(output.done)} clips are labelled already, {total} to come", file=sys.stderr)
    bar = tqdm(total=total, desc="predict", unit="clip", disable=None if total > 1 else True, leave=False)
    with output, StopRequest() as stop, bar:
        for row in rows:
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
            f"{added} clips with {seconds / 3600:.2f} hours of sound in {took:.0f} s: {added / took:.1f} clips/s, "
            f"{seconds / took:.0f} times real time",
            file=sys.stderr,
        )
    if output.failed:
        print(f"{output.failed} of {added + output.failed} could not be predicted{output.failures()}", file=sys.stderr)
    if stop.signum:
        print(f"stopped by {signal.Signals(stop.signum).name}; {output.ADVICE}", file=sys.stderr)
        return 128 + stop.signum
    return 0 if added or output.done else 1


class Terminal:
    """Labels on standard output, as text or as JSON lines."""

    ADVICE = "to be able to go on, use --output FILE.jsonl"
    done = frozenset()

    def __init__(self, as_json):
        self._as_json, self._failures = as_json, []

    @property
    def failed(self):
        return len(self._failures)

    def add(self, row):
        text = json_line(row) if self._as_json else label_text(row)
        tqdm.write(text.removesuffix("\n"), file=sys.stdout)  # keeps clear of the progress bar

    def fail(self, path, error):
        self._failures.append(error if path in error else f"{path}: {error}")

    def failures(self):
        return "".join(f"\n  {line}" for line in self._failures).replace("\n", ":\n", 1)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        sys.stdout.flush()


def label_text(row):
    """A row that has ``windows`` as lines for the terminal."""
    windows = len(row["windows"])
    length = f"{row['seconds']:.2f} s" + (f", mean of {windows} windows" if windows > 1 else "")
    best = [f"  {score:.4f}  {label}" for label, score in zip(row["labels"], row["scores"])]
    return "\n".join([f"{row['path']} ({length})", *best])
