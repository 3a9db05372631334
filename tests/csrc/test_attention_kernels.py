"""The CPU attention kernels of each instruction set against numpy, on buffers of the exact size of their tensors."""

import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

DTYPES = ("float32", "bfloat16")
# Queries and tokens: below, at and above multiples of the vector length, the tile height and the rows of a unit.
SIZES = [(1, 1), (3, 4), (6, 5), (7, 16), (13, 17), (5, 20), (97, 33), (2, 64), (100, 67), (200, 130), (3, 530)]
TOKENS = (1, 2, 3, 4, 5, 9, 16, 17, 20, 33, 67, 130)
CHANNELS = (1, 2, 5, 8, 17, 33, 64, 80)
TOLERANCE = {"float32": 1e-5, "bfloat16": 4e-2}


def store(x, dtype):
    """The array as the kernels read it: float32, or the bits of bfloat16."""
    x = np.ascontiguousarray(x, np.float32)
    if dtype == "float32":
        return x
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def load(x):
    """The numbers of a stored array in float64."""
    return (x if x.dtype == np.float32 else (x.astype(np.uint32) << 16).view(np.float32)).astype(np.float64)


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@functools.lru_cache(maxsize=2000)
def inputs_of(dtype, shape):
    """q ``[B, M, H, D]``, and k and v in one ``[B, N, 2, H, D]``. Shared by all instruction sets."""
    batch, heads, queries, tokens, channels = shape
    rng = np.random.default_rng(queries + tokens + channels)
    q = store(rng.standard_normal((batch, queries, heads, channels)), dtype)
    return q, store(rng.standard_normal((batch, tokens, 2, heads, channels)), dtype)


@functools.lru_cache(maxsize=2000)
def expected_of(dtype, shape, scale):
    """Output ``[B, M, H, D]``, log-sum-exp ``[B, H, M]`` and softmax matrix ``[B, H, M, N]`` in float64."""
    q, kv = map(load, inputs_of(dtype, shape))
    logits = scale * (q.transpose(0, 2, 1, 3) @ kv[:, :, 0].transpose(0, 2, 3, 1))
    weights, top = softmax(logits), logits.max()
    out = (weights @ kv[:, :, 1].transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    return out, np.log(np.exp(logits - top).sum(-1)) + top, weights


class Tensors:
    """Inputs of a kernel, each in a buffer of its exact size, and buffers for results."""

    def __init__(self, kernels, dtype, queries, tokens, channels, batch=2, heads=3):
        self.kernels, self.dtype = kernels, dtype
        self.shape = (batch, heads, queries, tokens, channels)
        self.q, self.kv = inputs_of(dtype, self.shape)
        self.out = np.full_like(self.q, 0x7FC0)
        self.lse = np.full((batch, heads, queries), np.nan, np.float32)

    def where(self, x, part=0):
        """(pointer, batch stride, head stride, token stride) of a part of ``[B, N, ..., H, D]``."""
        batch, token, *_, head, _item = x.strides
        size = x.itemsize
        return x.ctypes.data + part * x.strides[2], batch // size, head // size, token // size

    def call(self, name, *arguments):
        """Call the kernel in a new thread, whose scratch memory is not larger than this call needs."""
        with ThreadPoolExecutor(1) as pool:
            pool.submit(self.kernels.call, name, self.dtype, *arguments).result()

    def attend(self, scale):
        places = self.where(self.q), self.where(self.kv), self.where(self.kv, 1), self.where(self.out)
        self.call("attention", *self.shape, *places, self.lse.ctypes.data, scale)

    def attend_with_scores(self, scale, extra_tokens):
        batch, heads, _, tokens, channels = self.shape
        scores = np.full((batch, tokens - extra_tokens), np.nan, np.float32)
        places = self.where(self.q), self.where(self.kv), self.where(self.kv, 1), self.where(self.out)
        self.call(
            "column_mean_attention",
            batch,
            heads,
            tokens,
            channels,
            *places,
            self.lse.ctypes.data,
            scale,
            extra_tokens,
            scores.ctypes.data,
        )
        return scores

    def cls_scores(self, scale, extra_tokens):
        batch, heads, _, tokens, channels = self.shape
        scores = np.full((batch, tokens - extra_tokens), np.nan, np.float32)
        self.call(
            "cls_scores",
            batch,
            heads,
            tokens,
            channels,
            self.where(self.q),
            self.where(self.kv),
            scale,
            extra_tokens,
            scores.ctypes.data,
        )
        return scores

    def check(self, scale):
        """Compare the outputs. Return the expected softmax matrix ``[B, H, M, N]``."""
        out, lse, weights = expected_of(self.dtype, self.shape, scale)
        atol = TOLERANCE[self.dtype]
        np.testing.assert_allclose(load(self.out), out, atol=atol, rtol=atol)
        np.testing.assert_allclose(self.lse, lse, atol=1e-5, rtol=1e-5)
        return weights


@pytest.fixture
def kernels(isa, cpu):
    """The kernels of each instruction set, with 3 threads."""
    cpu.last = (3,)
    return cpu


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_attention(kernels, dtype, channels):
    for number, (queries, tokens) in enumerate(SIZES):
        # Only the packing of queries depends on the sign of the scale: each size has both signs among the channels.
        scale = -0.3 if (number + CHANNELS.index(channels)) % 2 else channels**-0.5
        tensors = Tensors(kernels, dtype, queries, tokens, channels)
        tensors.attend(scale)
        tensors.check(scale)


def extra_tokens_for(tokens, channels):
    """0, 1 or 2. They only offset rows and columns, so each number of tokens has one value per number of channels."""
    return (tokens + CHANNELS.index(channels)) % min(3, tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_column_mean_attention(kernels, dtype, channels):
    for tokens in TOKENS:
        extra_tokens = extra_tokens_for(tokens, channels)
        tensors = Tensors(kernels, dtype, tokens, tokens, channels)
        scores = tensors.attend_with_scores(channels**-0.5, extra_tokens)
        weights = tensors.check(channels**-0.5)
        expected = weights[:, :, extra_tokens:, extra_tokens:].mean((1, 2))
        np.testing.assert_allclose(scores, expected, rtol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_cls_scores(kernels, dtype, channels):
    for tokens in TOKENS:
        extra_tokens = extra_tokens_for(tokens, channels)
        scores = Tensors(kernels, dtype, 1, tokens, channels).cls_scores(0.3, extra_tokens)
        *_, weights = expected_of(dtype, (2, 3, 1, tokens, channels), 0.3)
        np.testing.assert_allclose(scores, weights[:, :, 0, extra_tokens:].mean(1), rtol=2e-5)


def test_result_does_not_depend_on_threads(kernels):
    """Threads divide the units of a head or blocks of keys, so two dtypes and few sizes suffice."""
    for dtype in DTYPES:
        for tokens in (5, 130, 400):
            results = []
            for threads in (1, 2, 3, 7):
                kernels.last = (threads,)
                tensors = Tensors(kernels, dtype, tokens, tokens, 64)
                scores, cls_scores = tensors.attend_with_scores(0.125, 1), tensors.cls_scores(0.125, 1)
                results.append((tensors.out, tensors.lse, scores, cls_scores))
            for result in results[1:]:
                for ours, first in zip(result, results[0]):
                    np.testing.assert_array_equal(ours, first)


def test_an_empty_batch_is_accepted(kernels):
    nothing = (0, 0, 0, 0)
    kernels.call("attention", "float32", 0, 1, 2, 2, 4, nothing, nothing, nothing, nothing, 0, 1.0)
    kernels.call("column_mean_attention", "float32", 0, 1, 2, 4, nothing, nothing, nothing, nothing, 0, 1.0, 1, 0)
    kernels.call("cls_scores", "bfloat16", 0, 1, 2, 4, nothing, nothing, 1.0, 1, 0)


class Call:
    """Call each kernel with null pointers. The argument check must fail before the kernel reads them."""

    HEADS = (0, 0, 0, 0)

    def __init__(self, cpu):
        self.cpu = cpu

    def attention(self, dtype="float32", batch=1, heads=1, queries=2, tokens=2, channels=4):
        self.cpu.call("attention", dtype, batch, heads, queries, tokens, channels, *[self.HEADS] * 4, 0, 1.0)

    def column_mean_attention(self, dtype="float32", batch=1, heads=1, tokens=2, channels=4, extra_tokens=1):
        self.cpu.call(
            "column_mean_attention", dtype, batch, heads, tokens, channels, *[self.HEADS] * 4, 0, 1.0, extra_tokens, 0
        )

    def cls_scores(self, dtype="float32", batch=1, heads=1, tokens=2, channels=4, extra_tokens=1):
        self.cpu.call("cls_scores", dtype, batch, heads, tokens, channels, *[self.HEADS] * 2, 1.0, extra_tokens, 0)


@pytest.mark.parametrize("name", ["attention", "column_mean_attention", "cls_scores"])
def test_arguments_are_checked(cpu, name):
    call = getattr(Call(cpu), name)
    for bad in ({"batch": -1}, {"heads": 0}, {"tokens": 0}, {"channels": 0}, {"channels": -3}):
        with pytest.raises(ValueError, match="expected batch >= 0 and heads, queries, tokens and channels >= 1, got "):
            call(**bad)
    for dtype in ("float16", "torch.float32", ""):
        with pytest.raises(ValueError, match=f"dtype must be float32 or bfloat16, got {dtype}"):
            call(dtype=dtype)
    cpu.last = (0,)
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        call()


def test_zero_queries_are_rejected(cpu):
    with pytest.raises(ValueError, match="expected batch >= 0 .* got 1, 1, 0, 2, 4"):
        Call(cpu).attention(queries=0)


@pytest.mark.parametrize("name", ["column_mean_attention", "cls_scores"])
@pytest.mark.parametrize("extra_tokens", [-1, 2, 3])
def test_extra_tokens_are_checked(cpu, name, extra_tokens):
    with pytest.raises(ValueError, match=rf"extra_tokens must be in 0..1, got {extra_tokens}"):
        getattr(Call(cpu), name)(extra_tokens=extra_tokens)


def test_heads_are_four_numbers(cpu):
    with pytest.raises(TypeError, match="q: "):
        cpu.call("cls_scores", "float32", 1, 1, 2, 4, (0, 0, 0), (0, 0, 0, 0), 1.0, 1, 0)


def test_an_unknown_instruction_set_is_rejected(compiled):
    previous = compiled.cpu_isa()
    with pytest.raises(
        ValueError, match=r"instruction set 'sse9' is not supported on this machine, choose from: .*baseline"
    ):
        compiled.cpu_use_isa("sse9")
    assert compiled.cpu_isa() == previous
    assert compiled.cpu_isas()[-1] == "baseline"
