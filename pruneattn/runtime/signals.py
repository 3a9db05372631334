"""Stopping cleanly: Ctrl-C and SIGTERM are noted, and the training loop looks at the note between two steps."""

import signal
import threading


class StopRequest:
    """Context in which the first SIGINT or SIGTERM only sets ``signum``; a second one acts at once, as usual.

    Loader workers start with the same handlers, so that a signal to the whole process group does not end them first.
    """

    def __init__(self):
        self.signum = 0

    def __enter__(self):
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *exception):
        self._restore()

    def _note(self, signum, frame):
        self.signum = signum
        self._restore()

    def _restore(self):
        while self._previous:
            signal.signal(*self._previous.popitem())
