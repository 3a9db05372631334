"""The emulated CUDA runtime: its features, and the kernel errors that it reports."""

import ctypes
from pathlib import Path

import numpy as np
import pytest

KERNELS = Path(__file__).with_name("runtime_kernels.cu")


@pytest.fixture(scope="session")
def library(build_emulated):
    return ctypes.CDLL(str(build_emulated("runtime_kernels", [KERNELS])))


@pytest.fixture
def run(library):
    """``run(name, a, b, data)``: error message of a kernel in runtime_kernels.cu, and the int32 numbers it wrote."""

    def run(name, a=0, b=0, data=None):
        data = np.zeros(512, np.int32) if data is None else data
        library.run.restype = ctypes.c_char_p
        error = library.run(name.encode(), data.ctypes.data_as(ctypes.c_void_p), ctypes.c_int(a), ctypes.c_int(b))
        return error.decode(), data

    return run


def test_dynamic_shared_memory(run):
    error, data = run("exchange", 64 * 4)
    assert error == ""
    assert (data[:64].view(np.uint32) == 0xA5A5A5A5).all(), "not poisoned"
    np.testing.assert_array_equal(data[64:128], np.arange(64)[::-1] ** 2)
    assert data[128] == 0, "not aligned"


def test_shared_memory_of_a_template_is_poisoned(run):
    error, data = run("poison")
    assert error == "" and (data[:60].view(np.uint32) == 0xA5A5A5A5).all()


@pytest.mark.parametrize("beyond,where", [(1, "past the end of"), (1000, "past the end of"), (-1, "before")])
def test_writes_outside_dynamic_shared_memory(run, beyond, where):
    error, _ = run("exchange", 64 * 4, beyond)
    assert error == (
        "emulated kernel exchange_kernel, block 0 of 64 threads: "
        f"a write {where} the 256 bytes of dynamic shared memory"
    )


def test_dynamic_shared_memory_has_a_limit(run, monkeypatch):
    assert run("exchange", 227 << 10)[0] == ""
    message = r"CUDA kernel exchange could not be launched with 232449 bytes of shared memory: invalid argument"
    assert run("exchange", (227 << 10) + 1)[0] == message
    monkeypatch.setenv("EMULATED_SHARED_LIMIT", "101376")
    assert run("attributes")[1][:5].tolist() == [101376, 102400, 9, 0, 1]


def test_device_attributes(run, monkeypatch):
    monkeypatch.setenv("EMULATED_CAPABILITY", "8.6")
    monkeypatch.setenv("EMULATED_MULTIPROCESSORS", "84")
    assert run("attributes")[1][:5].tolist() == [232448, 233472, 8, 6, 84]


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffle"])
def test_a_barrier_for_a_part_of_the_block(run, monkeypatch, order):
    monkeypatch.setenv("EMULATED_ORDER", order)
    error, data = run("halves")
    assert error == ""
    np.testing.assert_array_equal(data[:64], np.arange(64)[::-1])
    np.testing.assert_array_equal(data[64:128], np.arange(65, 129)[::-1])


@pytest.mark.parametrize(
    "kernel,a,b,message",
    [
        ("barrier", 64, 128, "a thread waits forever at barrier 1: 64 of 128 threads arrived"),
        ("barrier", 128, 64, "barrier 1: some threads expect 128 threads, others 64"),
        ("barrier", 96, 96, "a thread waits forever at barrier 1: 32 of 96 threads arrived"),
        ("barrier", 48, 48, "barrier 1 is for 48 threads: expected whole warps of the block"),
        ("barrier", 256, 256, "barrier 1 is for 256 threads: expected whole warps of the block"),
        ("half_warp", 0, 0, "barrier 3: only a part of a warp arrived"),
        ("divergent", 0, 0, "a thread waits forever at __syncthreads: 32 of 64 threads arrived"),
    ],
)
def test_inconsistent_barriers_are_errors(run, kernel, a, b, message):
    error, _ = run(kernel, a, b)
    assert error.startswith(f"emulated kernel {kernel}_kernel, block 0 of ") and error.endswith(f" threads: {message}")


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffle"])
def test_atomic_add_gives_each_thread_a_ticket(run, monkeypatch, order):
    monkeypatch.setenv("EMULATED_ORDER", order)
    error, data = run("tickets")
    assert error == "" and data[0] == 4 * 32
    everyone = [10000 * z + 100 * x + thread for z in range(2) for x in range(2) for thread in range(32)]
    assert sorted(data[1:129].tolist()) == everyone
    assert (data[1:129].tolist() == everyone) == (order == "forward")
    assert (data[1:129].tolist() == everyone[::-1]) == (order == "reverse")


@pytest.mark.parametrize("early", ["", "products", "copies"])
@pytest.mark.parametrize("pending", [0, 1, 2])
def test_copies_complete_at_the_wait(run, monkeypatch, early, pending):
    monkeypatch.setenv("EMULATED_EARLY", early)
    error, data = run("copies", pending, 1, np.arange(512, dtype=np.int32))
    there = 8 if early == "copies" else 4 * (2 - pending)
    assert error == ""
    assert data[:there].tolist() == list(range(8, 8 + there)) and (data[there:8] == -1).all()


def test_copies_without_a_wait_are_errors(run):
    for pending, expected in (
        (0, ""),
        (1, "before it waits for its asynchronous operations"),
        (2, "before it waits for its asynchronous operations"),
    ):
        error, _ = run("copies", pending, 0)
        assert error.endswith(expected) and bool(error) == bool(expected)


@pytest.mark.parametrize("early, before", [("copies", 0), ("products", 1)])
def test_products_complete_at_the_wait(run, monkeypatch, early, before):
    monkeypatch.setenv("EMULATED_EARLY", early)
    error, data = run("products")
    assert error == "" and (data[:128] == before).all() and (data[128:256] == 1).all()


def test_threads_have_a_stack_of_64_kilobytes(run):
    error, data = run("stack")
    assert error == "" and data[63] == 15999 - 63


def test_multiplication_rounds_up(run):
    rng = np.random.default_rng(0)
    numbers = np.concatenate([rng.standard_normal(200), [0.1, 3.0, 1e-30, 1e-38, -1e-38, 3e38]]).astype(np.float32)
    for a in numbers[::7]:
        for b in numbers[::11]:
            _, data = run("round_up", int(a.view(np.int32)), int(b.view(np.int32)))
            up, exact = data[:1].view(np.float32)[0], np.float64(a) * np.float64(b)
            below = np.nextafter(up, np.float32(-np.inf))
            assert np.float64(up) >= exact > np.float64(below) or up == exact
