"""Progress of a run: progress bar, one printed line per epoch, log.jsonl and TensorBoard events."""

from __future__ import annotations

import json
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from ..errors import UserError
from ..files import json_values
from ..runtime.distributed import is_main
from . import state


def say(*words: object) -> None:
    """Print in the main process only, above any progress bar."""
    if is_main():
        tqdm.write(" ".join(map(str, words)), file=sys.stdout)
        sys.stdout.flush()


class RunLog:
    """``log.jsonl`` (one JSON object per line; ``kind`` is "step" or "epoch"), and TensorBoard events next to it.

    Only the main process writes. If TensorBoard events cannot be written, the run continues without them.

    Args:
        folder: output folder of the run.
        keep_bytes: length of the part of an existing log that is kept. A resumed run repeats the steps after its
            checkpoint, so their lines are removed.
        step: optimizer step from which TensorBoard discards existing events; None to keep all.
        tensorboard: whether to write TensorBoard events.
    """

    def __init__(self, folder: Path, *, keep_bytes: int = 0, step: int | None = None, tensorboard: bool = True) -> None:
        self._file: BinaryIO | None = None
        self._board: Any = None  # SummaryWriter
        if not is_main():
            return
        self._file = open(folder / state.LOG, "ab")  # noqa: SIM115, closed by close()
        self._file.truncate(min(keep_bytes, self._file.tell()))
        self._file.seek(0, 2)
        if tensorboard:
            self._board = _summary_writer(folder / "tensorboard", step)

    @property
    def bytes(self) -> int:
        """Length of log.jsonl."""
        return self._file.tell() if self._file else 0

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Add a line; numbers also go to TensorBoard as ``kind/name``.

        Raises:
            UserError: log.jsonl cannot be written.
        """
        if self._file is None:
            return
        line = json.dumps(json_values({"kind": kind, "step": step, **values})) + "\n"
        try:
            self._file.write(line.encode())
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"cannot write {self._file.name}: {error.strerror}; the checkpoint {state.LAST} is unchanged"
            ) from None
        if self._board is not None:
            try:
                self._write_scalars(kind, step, values)
            except OSError as error:  # from its writing thread, for example if the disk is full
                _report_no_events(self._board.log_dir, error)
                self._board = None

    def _write_scalars(self, kind: str, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, (list, tuple)) and value:
                value = min(value)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Close the files."""
        for file in (self._file, self._board):
            with suppress(OSError):  # write() has reported it
                if file is not None:
                    file.close()


def _summary_writer(folder: Path, step: int | None) -> Any:
    """A ``SummaryWriter``, or None if it cannot write."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        say("no TensorBoard events: tensorboard is not installed (pip install 'pruneattn[train]')")
        return None
    try:
        return SummaryWriter(str(folder), purge_step=step)
    except OSError as error:
        _report_no_events(folder, error)
        return None


def _report_no_events(folder: Path | str, error: OSError) -> None:
    say(f"warning: cannot write {folder}: {error.strerror or error}; the run continues without TensorBoard events")


def progress_bar(total: int, start: int, text: str) -> tqdm:
    """A progress bar in a terminal; nothing if the output is not a terminal."""
    return tqdm(total=total, initial=start, desc=text, unit="step", leave=False, disable=None if is_main() else True)
