"""The first signal is recorded, the second acts."""

import os
import signal
import threading

import pytest

from pruneattn.runtime.signals import StopRequest


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_is_recorded_and_second_acts(signum):
    received = []
    before = signal.signal(signum, lambda number, frame: received.append(number))
    try:
        with StopRequest() as stop:
            assert stop.signum == 0
            os.kill(os.getpid(), signum)
            assert stop.signum == signum and received == []
            os.kill(os.getpid(), signum)
            assert received == [signum]
    finally:
        signal.signal(signum, before)


def test_handlers_are_restored():
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(RuntimeError, match="inside"), StopRequest() as stop:
        assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) != before[0]
        raise RuntimeError("inside")
    assert stop.signum == 0
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before


def test_other_threads_can_enter():
    entered = []

    def enter():
        with StopRequest() as stop:
            entered.append(stop.signum)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [0]
