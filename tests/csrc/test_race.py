"""The race finder of `make race` reports kernels with a data race, and accepts the same kernels without it."""

import ctypes
from pathlib import Path

import numpy as np
import pytest

KERNELS = Path(__file__).with_name("race_kernels.cu")


@pytest.fixture(scope="session")
def library(build_emulated):
    return ctypes.CDLL(str(build_emulated("race_kernels", [KERNELS], race=True)))


@pytest.fixture
def run(library):
    """``run(name)``: the error message of a kernel of race_kernels.cu and the int32 numbers that it wrote."""

    def run(name):
        data = np.zeros(1024, np.int32)
        library.run.restype = ctypes.c_char_p
        return library.run(name.encode(), data.ctypes.data_as(ctypes.c_void_p)).decode(), data

    return run


ORDERS = ["forward", "reverse", "shuffle"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "name",
    [
        "own",
        "warp, in it",
        "half, in it",
        "block",
        "read then write, barrier",
        "exchange",
        "bytes",
        "last block",
        "last block, all fence",
    ],
)
def test_no_race(run, monkeypatch, name, order):
    monkeypatch.setenv("EMULATED_ORDER", order)
    error, data = run(name)
    assert error == ""
    if name == "block":
        np.testing.assert_array_equal(data[:128], np.arange(128)[::-1])
    if name.startswith("last block"):
        assert data[0] == (6 * 7 if name == "last block" else 6 * 2)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "name,where,what",
    [
        ("none", "shared", "no barrier"),
        ("warp, beyond it", "shared", "no barrier"),
        ("half, beyond it", "shared", "no barrier"),
        ("read then write", "shared", "no barrier"),
        ("exchange, memory", "shared", "no barrier"),
        ("same place", "global", "no fences around atomic operations"),
        ("last block, no fence before", "global", "no fences around atomic operations"),
        ("last block, no fence after", "global", "no fences around atomic operations"),
        ("last block, no barrier", "global", "no fences around atomic operations"),
        ("plain count", "global", "no barrier"),
    ],
)
def test_race(run, monkeypatch, name, where, what, order):
    monkeypatch.setenv("EMULATED_ORDER", order)
    error, _ = run(name)
    assert f"race in {where} memory: thread " in error and what in error, error


def test_the_report_of_a_race_has_both_source_lines(run, monkeypatch):
    monkeypatch.delenv("EMULATED_ORDER", raising=False)
    lines = KERNELS.read_text().splitlines()
    write = 1 + next(number for number, line in enumerate(lines) if "shared[threadIdx.x] = threadIdx.x" in line)
    error, _ = run("none")
    assert error.startswith("emulated kernel write_read_kernel<") and "block 0 of 128 threads: race in shared" in error
    assert (
        f"thread 0 of block 0 reads in write_read_kernel<(Barrier)0>(int*, int) at race_kernels.cu:{write + 2}" in error
    )
    assert f"thread 1 of block 0 writes in write_read_kernel<(Barrier)0>(int*, int) at race_kernels.cu:{write}" in error
