"""The emulated conversions of csrc/cuda/device.cuh, for every half-precision number. nvcc compiles the native code."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
EXPORTS = """
#include "device.cuh"
using namespace pruneattn::cuda;
extern "C" {
float half_to_float(uint16_t bits) { return to_float(Half{bits}); }
float bfloat16_to_float(uint16_t bits) { return to_float(Bfloat16{bits}); }
uint16_t float_to_half(float x) { return from_float<Half>(x).bits; }
uint16_t float_to_bfloat16(float x) { return from_float<Bfloat16>(x).bits; }
float exponential(float x) { return exp2_approximate(x); }
}
"""
KERNEL = """
#include "device.cuh"
using namespace pruneattn::cuda;
__global__ void f(float* x, Half* h, Bfloat16* b) {
  const float sum = exp2_approximate(to_float(x[0]) + to_float(h[0]) + to_float(b[0]));
  x[0] = from_float<float>(sum);
  h[0] = from_float<Half>(sum);
  b[0] = from_float<Bfloat16>(sum);
}
"""
ALL = np.arange(2**16, dtype=np.uint16)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on the PATH")
    folder = tmp_path_factory.mktemp("numbers")
    (folder / "exports.cpp").write_text(EXPORTS)
    flags = [
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-shared",
        f"-I{ROOT / 'csrc/cuda'}",
        f"-I{ROOT / 'csrc'}",
        f"-I{ROOT / 'tests/csrc/runtime'}",
    ]
    subprocess.run(["g++", *flags, folder / "exports.cpp", "-o", folder / "numbers.so"], check=True)
    library = ctypes.CDLL(str(folder / "numbers.so"))
    number, bits = ctypes.c_float, ctypes.c_uint16
    for name, result, argument in (
        ("half_to_float", number, bits),
        ("bfloat16_to_float", number, bits),
        ("float_to_half", bits, number),
        ("float_to_bfloat16", bits, number),
        ("exponential", number, number),
    ):
        getattr(library, name).restype, getattr(library, name).argtypes = result, [argument]
    return library


def values_of(function, bits):
    return np.array([function(int(b)) for b in bits], np.float32)


def bits_of(function, values):
    return np.array([function(float(x)) for x in values], np.uint16)


def test_widening(numbers):
    np.testing.assert_array_equal(values_of(numbers.half_to_float, ALL), ALL.view(np.float16).astype(np.float32))
    expected = (ALL.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(values_of(numbers.bfloat16_to_float, ALL), expected)


def irregular(bits_kept):
    """float32 numbers of all sizes, including midpoints between two half-precision numbers and their neighbors."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 4000, dtype=np.uint32)
    cut = bits & np.uint32(0x100000000 - (1 << bits_kept))
    middle = cut + np.uint32(1 << (bits_kept - 1))
    sizes = np.exp2(rng.uniform(-27, 17, 4000)).astype(np.float32).view(np.uint32)
    ties = sizes & np.uint32(0xFFFFF000)  # midpoints of halves, for numbers that are not too small
    values = np.concatenate([bits, cut, middle, middle - 1, middle + 1, sizes, ties]).view(np.float32)
    return values[~np.isnan(values)]


def test_rounding_to_half(numbers):
    halfway = np.float32([65519, 65520, 65535, 1e9, np.inf, 2**-25, 2**-24, 3 * 2**-25, 2**-26, 0.0])
    values = np.concatenate([irregular(13), halfway, -halfway])
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16).view(np.uint16)
    np.testing.assert_array_equal(bits_of(numbers.float_to_half, values), expected)
    assert numbers.float_to_half(np.nan) == 0x7FFF


def test_rounding_to_bfloat16(numbers):
    torch = pytest.importorskip("torch")
    values = np.concatenate([irregular(16), np.float32([3.4e38, np.inf, -np.inf, 0.0, -0.0])])
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(bits_of(numbers.float_to_bfloat16, values), expected)
    assert numbers.float_to_bfloat16(np.nan) == 0x7FFF


def test_exponential(numbers):
    for x in (0.0, -1.0, 3.5, -125.75, 127.75):
        assert numbers.exponential(x) == pytest.approx(2.0**x, rel=1e-6)
    assert numbers.exponential(-np.inf) == numbers.exponential(-126.5) == 0 and numbers.exponential(128.0) == np.inf
    assert np.isnan(numbers.exponential(np.nan))


@pytest.mark.slow
def test_nvcc_compiles_the_native_numbers(setup_module, tmp_path):
    nvcc = setup_module.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is not in CUDA_HOME, PATH or /usr/local/cuda")
    (tmp_path / "x.cu").write_text(KERNEL)
    flags = ["-std=c++17", "-Xcompiler", "-Wall,-Wextra", "-Werror", "all-warnings", "-arch=sm_80"]
    subprocess.run(
        [nvcc, *flags, f"-I{ROOT / 'csrc/cuda'}", "-c", tmp_path / "x.cu", "-o", tmp_path / "x.o"], check=True
    )
