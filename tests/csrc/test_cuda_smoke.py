"""One small run of each emulated CUDA kernel against numpy. The tests marked ``emulated`` cover the kernels in full."""

import ctypes
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
BATCH, HEADS, PATCHES, KEEP = 2, 2, 68, 40
TOKENS = PATCHES + 1  # the class token is first


@pytest.fixture(scope="session")
def library(build_library):
    sources = [*sorted((ROOT / "csrc").rglob("*.cu")), Path(__file__).with_name("smoke.cpp")]
    return ctypes.CDLL(str(build_library("smoke", sources)))


@pytest.fixture
def run(library):
    """``run(name, *arguments)``: calls a launcher with arrays and integers. Fails with the launcher's error."""

    def run(name, *arguments):
        function = getattr(library, name)
        function.restype = ctypes.c_char_p
        is_array = [isinstance(argument, np.ndarray) for argument in arguments]
        assert all(argument.flags.c_contiguous for argument, array in zip(arguments, is_array) if array)
        converted = [
            ctypes.c_void_p(argument.ctypes.data) if array else ctypes.c_int64(argument)
            for argument, array in zip(arguments, is_array)
        ]
        assert function(*converted) == b""

    return run


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def best(scores):
    return np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :KEEP], axis=1)


def kept(x, index):
    return np.stack([np.concatenate([clip[:1], clip[1:][i]]) for clip, i in zip(x, index)])


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def test_select_tokens(run, rng):
    scores = rng.choice(rng.random(PATCHES // 2, np.float32), (BATCH, PATCHES))  # with ties
    index = np.full((BATCH, KEEP), -7)
    run("select_tokens", scores, BATCH, PATCHES, KEEP, index)
    np.testing.assert_array_equal(index, best(scores))


@pytest.mark.parametrize("row_bytes", [6, 200])  # with 200, each thread copies several pieces
def test_gather_tokens(run, rng, row_bytes):
    x = rng.integers(0, 256, (BATCH, TOKENS, row_bytes), dtype=np.uint8)
    index, out = rng.integers(0, PATCHES, (BATCH, KEEP)), np.zeros((BATCH, 1 + KEEP, row_bytes), np.uint8)
    run("gather_tokens", index, BATCH, PATCHES, KEEP, x, out, row_bytes)
    np.testing.assert_array_equal(out, kept(x, index))


def test_prune_epilogue(run, rng):
    partials = rng.random((BATCH, 3, PATCHES), np.float32)
    x = rng.integers(0, 256, (BATCH, TOKENS, 24), dtype=np.uint8)
    scores, index = np.zeros((BATCH, PATCHES), np.float32), np.full((BATCH, KEEP), -7)
    out = np.zeros((BATCH, 1 + KEEP, 24), np.uint8)
    run("prune_epilogue", partials, BATCH, 3, PATCHES, KEEP, scores, index, x, out, 24)
    np.testing.assert_array_equal(scores, partials[:, 0] + partials[:, 1] + partials[:, 2])
    np.testing.assert_array_equal(index, best(scores))
    np.testing.assert_array_equal(out, kept(x, index))


@pytest.mark.parametrize("channels", [5, 16])
def test_cls_scores(run, rng, channels):
    q = rng.standard_normal((BATCH, HEADS, 1, channels), np.float32)
    k = rng.standard_normal((BATCH, HEADS, TOKENS, channels), np.float32)
    partials = np.zeros((BATCH, HEADS, PATCHES), np.float32)
    run("cls_scores", q, k, BATCH, HEADS, TOKENS, channels, partials)
    expected = softmax(0.25 * (q @ k.swapaxes(2, 3)).astype(np.float64))[:, :, 0, 1:] / HEADS
    np.testing.assert_allclose(partials, expected, rtol=2e-5)


@pytest.mark.parametrize(
    "tokens", [66, TOKENS, 130]
)  # one tile and 2 single queries, two tiles, two tiles and 2 queries
def test_column_mean_attention(run, rng, tokens):
    q, k, v = rng.standard_normal((3, BATCH, HEADS, tokens, 64)).astype(np.float16)
    out, lse = np.zeros_like(q), np.zeros((BATCH, HEADS, tokens), np.float32)
    partials = np.zeros((BATCH, HEADS, tokens - 1), np.float32)
    run("column_mean_attention", q, k, v, BATCH, HEADS, tokens, out, lse, partials)
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    logits = 0.125 * (q @ k.swapaxes(2, 3))
    weights = softmax(logits)
    np.testing.assert_allclose(out, weights @ v, atol=2e-3)
    np.testing.assert_allclose(lse, np.log(np.exp(logits).sum(-1)), rtol=2e-6, atol=2e-5)
    np.testing.assert_allclose(partials.sum(1), weights[:, :, 1:, 1:].mean((1, 2)), rtol=3e-5)
