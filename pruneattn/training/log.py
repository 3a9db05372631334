"""What a run tells while it goes on: progress bar, one line per epoch, log.jsonl and TensorBoard."""

import json
import sys
import warnings
from contextlib import suppress

from tqdm import tqdm

from ..errors import UserError
from ..files import json_values
from ..runtime.distributed import is_main
from . import state


def say(*words):
    """Print in the main process only, past any progress bar."""
    if is_main():
        tqdm.write(" ".join(map(str, words)), file=sys.stdout)
        sys.stdout.flush()


class RunLog:
    """``log.jsonl`` (a JSON object per line: ``kind`` is "step" or "epoch") and TensorBoard events beside it.

    Only the main process writes. ``keep_bytes`` is the part of an existing log that is kept: what came after the
    checkpoint that a run goes on from is cut off, since it will come again, and TensorBoard is told
    to forget its events from ``step`` on. Where its events cannot be written, the run goes on without them.
    """

    def __init__(self, folder, *, keep_bytes=0, step=None, tensorboard=True):
        self._file = self._board = None
        if not is_main():
            return
        self._file = open(folder / state.LOG, "ab")
        self._file.truncate(min(keep_bytes, self._file.tell()))
        self._file.seek(0, 2)
        if tensorboard:
            self._board = _summary_writer(folder / "tensorboard", step)

    @property
    def bytes(self):
        """Length of the log file."""
        return self._file.tell() if self._file else 0

    def write(self, kind, step, **values):
        """Add a line; numbers also go to TensorBoard as ``kind/name``."""
        if self._file is None:
            return
        line = json.dumps(json_values({"kind": kind, "step": step, **values})) + "\n"
        try:
            self._file.write(line.encode())
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"cannot write {self._file.name}: {error.strerror}; {state.LAST} is as it was last saved"
            ) from None
        if self._board is not None:
            try:
                self._write_scalars(kind, step, values)
            except OSError as error:  # of its writing thread, such as that of a full disk
                _say_no_events(self._board.log_dir, error)
                self._board = None

    def _write_scalars(self, kind, step, values):
        for name, value in values.items():
            if isinstance(value, (list, tuple)) and value:
                value = min(value)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self):
        for file in (self._file, self._board):
            with suppress(OSError):  # a full disk has been reported before
                if file is not None:
                    file.close()


def _summary_writer(folder, step):
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
        _say_no_events(folder, error)
        return None


def _say_no_events(folder, error):
    say(f"warning: cannot write {folder}: {error.strerror or error}; the run goes on without TensorBoard events")


def progress_bar(total, start, text):
    """A bar in a terminal, nothing elsewhere."""
    return tqdm(total=total, initial=start, desc=text, unit="step", leave=False, disable=None if is_main() else True)
