import time

import pytest
import torch

from pruneattn import timing
from pruneattn.timing import time_side_by_side


def test_rounds_take_turns(monkeypatch):
    """With a clock that only the variants move: a machine that becomes slower and slower hits both alike."""
    clock, order = [0.0], []

    def variant(name, cost):
        def call():
            order.append(name)
            clock[0] += cost * (1 + len(order))  # slower with every call

        return call

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    seconds = time_side_by_side({"slow": variant("slow", 2.0), "fast": variant("fast", 1.0)}, "cpu", rounds=4)
    assert order == ["slow", "slow", "fast", "fast"] + ["slow", "fast", "fast", "slow"] * 2
    assert seconds["slow"] / seconds["fast"] == pytest.approx(2.0, rel=0.02)


def test_short_calls_fill_a_round(monkeypatch):
    clock, calls = [0.0], [0]

    def tick():
        calls[0] += 1
        clock[0] += 0.001 if calls[0] > 1 else 5.0  # the first call compiles

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert time_side_by_side({"it": tick}, "cpu", rounds=3)["it"] == pytest.approx(0.001)
    assert calls[0] == pytest.approx(2 + 3 * timing._SHORTEST_ROUND / 0.001, abs=4)


def test_real_clock():
    seconds = time_side_by_side({"a": lambda: time.sleep(0.02), "b": lambda: time.sleep(0.06)}, "cpu", rounds=2)
    assert 0.019 < seconds["a"] < seconds["b"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_waits_for_the_device():
    x = torch.randn(4096, 4096, device="cuda")
    seconds = time_side_by_side({"one": lambda: x @ x, "four": lambda: [x @ x for _ in range(4)]}, "cuda", rounds=5)
    assert seconds["four"] / seconds["one"] == pytest.approx(4, rel=0.3)
