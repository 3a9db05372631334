import pytest
import torch

from bench.harness import peers
from bench.harness.machine import Peaks
from pruneattn.runtime import timing


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One thread, and one call in each round."""
    monkeypatch.setattr(timing, "_SHORTEST_ROUND", 1e-9)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def peaks():
    return Peaks(copy=1e10, product={"float32": 1e11, "bfloat16": 1e11})


@pytest.fixture
def not_compiled(monkeypatch):
    """Models run eagerly instead of compiled: compiling takes half a minute for each model."""
    monkeypatch.setattr(peers, "compiled", lambda model, fbank: model)
