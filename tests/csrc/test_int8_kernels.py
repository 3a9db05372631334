"""The 8-bit linear layer of each instruction set against numpy, on buffers of the exact size of their tensors."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

DTYPES = ("float32", "bfloat16")
# Rows, input and output channels: below, at and above multiples of a tile's rows (4, 6, 12), of a block's rows (96), of
# a group of input channels (16), of a chunk (256), and of the columns of a tile (8, 16, 32).
SIZES = [
    (1, 1, 1),
    (2, 3, 9),
    (3, 15, 16),
    (4, 16, 17),
    (5, 17, 31),
    (6, 33, 32),
    (7, 31, 33),
    (11, 48, 40),
    (13, 256, 8),
    (97, 257, 7),
    (110, 20, 65),
]
TOLERANCE = {"float32": 2e-6, "bfloat16": 5e-3}


def quantized(x):
    """Integers and scales of the rows of a float32 array."""
    top = np.abs(x).max(-1, keepdims=True)
    return np.rint(x * (np.float32(127) / top)), top / np.float32(127)


def packed(weight):
    """The packed form of an int8 array ``[N, K]``."""
    out, channels = weight.shape
    padded = np.pad(weight.astype(np.int16) + 128, ((0, -out % 32), (0, -channels % 16)), constant_values=128)
    return np.ascontiguousarray(padded.astype(np.uint8).reshape(len(padded) // 32, 32, -1, 4).transpose(0, 2, 1, 3))


def run(kernels, dtype, x, weight, scale, bias=None, residual=None, norm=(None, None), gelu=False):
    """Call the kernel in a new thread, whose scratch memory is not larger than this call needs."""
    rows, channels = x.shape
    out = len(scale)
    y = np.full((rows, out), 0x7FC0, x.dtype)

    def pointer(array):
        return 0 if array is None else array.ctypes.data

    def place(array):
        if array is None:
            return 0, 1, 0, 0
        return pointer(array), max(1, rows), 0, array.strides[0] // array.itemsize

    parameters = [pointer(array) for array in (weight, scale, bias, *norm)]
    sizes = (dtype, rows, channels, out)
    with ThreadPoolExecutor(1) as pool:
        call = (*sizes, place(x), place(residual), pointer(y), *parameters, 1e-5, gelu)
        pool.submit(kernels.call, "int8_linear", *call).result()
    return y


@pytest.fixture(scope="session")
def numbers(load_file):
    """``store`` and ``load`` of the attention tests: arrays in the dtype of a kernel."""
    return load_file(Path(__file__).with_name("test_attention_kernels.py"))


@pytest.fixture
def kernels(isa, cpu):
    """The kernels of each instruction set, with 3 threads."""
    cpu.last = (3,)
    return cpu


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values(kernels, numbers, dtype, size):
    rows, channels, out = size
    rng = np.random.default_rng(rows)
    x = numbers.store(rng.standard_normal((rows, channels)), dtype)[::-1]  # negative row stride
    residual = numbers.store(rng.standard_normal((rows, out)), dtype)[::-1]
    weight = rng.integers(-128, 128, (out, channels))
    scale, bias = (rng.random(out, np.float32) for _ in range(2))
    q, row_scale = quantized(numbers.load(x).astype(np.float32))
    product = q @ weight.T * row_scale.astype(np.float64) * scale
    for b, r in ((None, None), (bias, None), (None, residual), (bias, residual)):
        expected = product + (0 if b is None else b) + (0 if r is None else numbers.load(r))
        y = numbers.load(run(kernels, dtype, x, packed(weight), scale, b, r))
        np.testing.assert_allclose(y, expected, rtol=0, atol=TOLERANCE[dtype] * (1 + np.abs(expected).max()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_and_gelu(kernels, numbers, dtype):
    """One output channel reads one input channel, and the others are zero: the result is the quantized number."""
    for channels in (1, 7, 17, 40):
        rng = np.random.default_rng(channels)
        x = numbers.store(rng.standard_normal((5, channels)) + 10, dtype)
        norm = tuple(rng.standard_normal(channels).astype(np.float32) for _ in range(2))
        exact = numbers.load(x)
        exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-5)
        exact = exact * norm[0] + norm[1]
        weight, scale = packed(np.eye(channels, dtype=np.int64)), np.ones(channels, np.float32)
        limit = np.abs(exact).max(-1, keepdims=True) / 250 + 0.02 * (dtype == "bfloat16")
        assert (np.abs(numbers.load(run(kernels, dtype, x, weight, scale, norm=norm)) - exact) <= limit).all()
        bias = np.full(channels, 100, np.float32)
        positive = numbers.load(run(kernels, dtype, x, weight, scale, bias, None, norm, True))
        assert (np.abs(positive - 100 - exact) <= limit + 0.5 * (dtype == "bfloat16")).all()


def test_integer_sums_are_exact_and_equal_for_all_threads(kernels):
    rng = np.random.default_rng(0)
    weight, x = rng.integers(-127, 128, (70, 768)), rng.integers(-127, 128, (50, 768)).astype(np.float32)
    x[:, 3] = 127
    x[:2], weight[:2] = 127, [[-127], [127]]
    for threads in (1, 2, 5):
        kernels.last = (threads,)
        y = run(kernels, "float32", x, packed(weight), np.ones(70, np.float32))
        np.testing.assert_array_equal(y, x.astype(np.float64) @ weight.T)


def test_rows_without_a_scale(kernels):
    weight, scale = packed(np.full((33, 20), 127)), np.ones(33, np.float32)
    x = np.ones((15, 20), np.float32)
    x[3], x[4], x[5, 19], x[6, 0], x[14, 7] = 0, 1e-38, np.nan, np.inf, -np.inf
    y = run(kernels, "float32", x, weight, scale)
    bad = [5, 6, 14]
    assert np.isnan(y[bad]).all() and (y[3:5] == 0).all()
    good = np.delete(y, [3, 4, *bad], 0)
    np.testing.assert_allclose(good, np.full_like(good, 20 * 127), rtol=1e-6)


def test_no_rows(kernels):
    run(kernels, "float32", np.empty((0, 4), np.float32), packed(np.ones((3, 4))), np.ones(3, np.float32))


def test_arguments_are_checked(cpu):
    """The pointers are null. The check must fail before the kernel reads them."""

    def call(dtype="float32", rows=2, channels=4, out=3, x=(0, 2, 0, 4)):
        cpu.call("int8_linear", dtype, rows, channels, out, x, (0, 1, 0, 0), 0, 0, 0, 0, 0, 0, 1e-5, False)

    for bad in ({"rows": -1}, {"channels": 0}, {"channels": 131073}, {"out": 0}):
        with pytest.raises(ValueError, match=r"expected rows >= 0, channels in 1\.\.131072 and out >= 1, got "):
            call(**bad)
    with pytest.raises(ValueError, match="x: expected at least 1 row per batch, got 0"):
        call(x=(0, 0, 0, 4))
    with pytest.raises(ValueError, match="dtype must be float32 or bfloat16, got float16"):
        call("float16")
    cpu.last = (0,)
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        call()
