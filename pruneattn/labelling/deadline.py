"""An end for runs that a signal should stop but whose main thread is blocked."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

#: Seconds between a signal and the end of the process, if the run has not ended by itself.
SECONDS = 20.0


class Deadline:
    """Context manager that ends the process some time after SIGINT or SIGTERM, if the block has not ended by then.

    A signal handler in Python only runs when the main thread executes Python code: it does not run while a library
    reads from a file system that does not answer. Outside the main thread, where Python accepts no signals, this class
    does nothing.

    Args:
        finish: called before the end, to write the rows that are ready. No thread may hold ``lock`` for long.
        advice: end of the message that the process prints.
    """

    def __init__(self, finish: Callable[[], Any], advice: str) -> None:
        self.lock = threading.Lock()  # of the objects that `finish` uses
        self._finish, self._advice = finish, advice
        self._done = threading.Event()

    def __enter__(self) -> Deadline:
        self._previous = None
        if threading.current_thread() is threading.main_thread():
            self._receiver, self._sender = socket.socketpair()
            self._sender.setblocking(False)
            # The numbers of signals are sent by the handler in C, which runs at once.
            self._previous = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        if self._previous is not None:
            signal.set_wakeup_fd(self._previous)
            self._sender.close()  # ends the thread

    def _watch(self) -> None:
        with self._receiver:
            while received := self._receiver.recv(1):
                signum = received[0]
                if signum in (signal.SIGINT, signal.SIGTERM) and not self._done.wait(SECONDS):
                    self._end(signum)

    def _end(self, signum: int) -> None:
        self.lock.acquire(timeout=SECONDS)
        try:
            self._finish()
            print(
                f"stopped by {signal.Signals(signum).name}, {SECONDS:g} s after it, because the clip in progress did "
                f"not end; {self._advice}",
                file=sys.stderr,
                flush=True,
            )
        finally:
            os._exit(128 + signum)
