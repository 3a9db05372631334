"""Clean stops: SIGINT and SIGTERM are recorded, and the training loop checks the record between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class StopRequest:
    """Context manager in which the first SIGINT or SIGTERM only sets ``signum``; a second one acts immediately.

    Worker processes of a data loader inherit the handlers, so that a signal to the whole process group does not end
    the workers before the main process. Outside the main thread, where Python accepts no handlers, it does nothing.

    Attributes:
        signum: number of the received signal, 0 if none.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._previous: dict[signal.Signals, Any] = {}  # the handlers to restore

    def __enter__(self) -> StopRequest:
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._record)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _record(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())
