"""The CUDA kernel column_mean_attention against numpy in float64, with emulated wgmma and mma.sync, and on a GPU."""

import numpy as np
import pytest

D = 64
TOLERANCE = {"float16": 2e-3, "bfloat16": 1.6e-2}  # for outputs of about 1: rounding of weights and sum


def to_bits(x, dtype):
    """float32 rounded to half precision, as uint16 bits."""
    if dtype == "float16":
        return x.astype(np.float16).view(np.uint16)
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def from_bits(bits, dtype):
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def softmax_matrix(q, k, scale):
    with np.errstate(all="ignore"):
        logits = q @ k.swapaxes(-1, -2) * scale
        shifted = np.exp(logits - logits.max(-1, keepdims=True))
        return shifted / shifted.sum(-1, keepdims=True), logits


class Case:
    """A random packed qkv [B, N, 3, H, 64] and the expected results."""

    def __init__(self, kernels, batch, heads, tokens, extra=1, dtype="bfloat16", scale=0.125, change=None, spread=1.0):
        rng = np.random.default_rng(tokens)
        self.kernels, self.shape, self.extra, self.dtype, self.scale = (
            kernels,
            (batch, heads, tokens),
            extra,
            dtype,
            scale,
        )
        packed = spread * rng.standard_normal((batch, tokens, 3, heads, D))
        if change:
            change(packed)
        self.bits = to_bits(packed.astype(np.float32), dtype)
        self.q, self.k, self.v = from_bits(self.bits, dtype).transpose(2, 0, 3, 1, 4)

    def run(self):
        """Return out [B, H, N, 64] and lse [B, H, N] in float64, and partial column means [B, H * parts, P]."""
        batch, heads, tokens = self.shape
        put, get, parts = self.kernels.memory.put, self.kernels.memory.get, self.parts()
        _source, pointer = put(self.bits)
        strides = (tokens * 3 * heads * D, D, 3 * heads * D)
        q, k, v = ((pointer + 2 * part * heads * D, *strides) for part in range(3))
        out, out_ptr = put(np.full((batch, tokens, heads, D), 0xFFFF, np.uint16))
        lse, lse_ptr = put(np.full((batch, heads, tokens), np.nan, np.float32))
        sums, sums_ptr = put(np.full((batch, heads * parts, tokens - self.extra), np.nan, np.float32))
        places = (q, k, v, (out_ptr, tokens * heads * D, D, heads * D), lse_ptr, self.scale)
        self.kernels.call("column_mean_attention", self.dtype, *self.shape, D, *places, self.extra, sums_ptr, parts)
        return from_bits(get(out), self.dtype).transpose(0, 2, 1, 3), get(lse).astype(np.float64), get(sums)

    def parts(self):
        batch, heads, tokens = self.shape
        return self.kernels.module.cuda_attention_parts(batch * heads, tokens, 0)

    def expected(self):
        """Return output, log-sum-exp and column means in float64."""
        weights, logits = softmax_matrix(self.q, self.k, self.scale)
        with np.errstate(all="ignore"):
            top = logits.max(-1)
            lse = top + np.log(np.exp(logits - top[..., None]).sum(-1))
        return weights @ self.v, lse, weights[:, :, self.extra :, self.extra :].mean((1, 2))

    def check(self, out, lse, scores):
        expected_out, expected_lse, expected_scores = self.expected()
        np.testing.assert_allclose(
            out, expected_out, rtol=0, atol=TOLERANCE[self.dtype] * max(1, np.abs(self.v).max() / 4)
        )
        np.testing.assert_allclose(lse, expected_lse, rtol=2e-6, atol=2e-5)
        np.testing.assert_allclose(scores, expected_scores, rtol=3e-5, atol=1e-9)


# The sizes of real models, one per instantiation. The dtype changes only conversions, so each size has one of the two.
@pytest.mark.parametrize(
    "tokens,dtype",
    [
        (65, "bfloat16"),
        (257, "float16"),
        (360, "bfloat16"),
        (450, "float16"),
        (513, "bfloat16"),
        (514, "float16"),
        (576, "bfloat16"),
    ],
)
def test_real_sizes(cuda_attention, tokens, dtype):
    case = Case(cuda_attention, 1, 2 if tokens < 500 else 1, tokens, 2 if tokens == 514 else 1, dtype)
    out, lse, sums = case.run()
    case.check(out, lse, sums.astype(np.float64).sum(1))


@pytest.mark.parametrize("tokens", [288, 289, 384, 385, 480, 481, 544, 545])
def test_the_minimum_and_maximum_tokens_of_each_instantiation(cuda_attention, tokens):
    case = Case(cuda_attention, 1, 1, tokens)
    out, lse, sums = case.run()
    case.check(out, lse, sums.astype(np.float64).sum(1))


@pytest.mark.parametrize("extra", [0, 1, 2])
def test_every_small_number_of_tokens(cuda_attention, extra):
    # The boundaries of 8 columns, 16 keys, the two groups' 48 keys and 64 queries, each with its neighbors, and one
    # tile plus a few rows. Other numbers take the same branches.
    for tokens in (2, 3, 7, 8, 9, 15, 16, 17, 33, 47, 48, 49, 63, 64, 65, 66, 67, 80, 95, 96, 97, 127, 128, 129, 130):
        if tokens <= extra:
            continue
        case = Case(cuda_attention, 1, 1, tokens, extra, "bfloat16" if tokens % 2 else "float16")
        out, lse, sums = case.run()
        case.check(out, lse, sums.astype(np.float64).sum(1))


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffle"])
@pytest.mark.parametrize("early", ["", "copies", "products", "copies and products"])
def test_result_does_not_depend_on_timing(emulated_attention, monkeypatch, order, early):
    cases = [Case(emulated_attention, 2, 1, 130), Case(emulated_attention, 1, 1, 257)]
    expected = [case.run() for case in cases]
    monkeypatch.setenv("EMULATED_ORDER", order)
    monkeypatch.setenv("EMULATED_EARLY", early)
    for first, case in zip(expected, cases):
        for one, other in zip(first, case.run()):
            np.testing.assert_array_equal(one, other)


def test_same_bits_in_every_run(cuda_attention):
    case = Case(cuda_attention, 2, 2, 130)
    first = case.run()
    for _ in range(2):
        for one, other in zip(first, case.run()):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("spread", [30.0, 1e-3])
def test_sharp_and_flat_rows(cuda_attention, spread):
    case = Case(cuda_attention, 1, 2, 200, spread=spread)
    out, _lse, sums = case.run()
    expected = case.expected()
    np.testing.assert_allclose(out, expected[0], rtol=2e-2, atol=TOLERANCE["bfloat16"] * spread)
    np.testing.assert_allclose(sums.astype(np.float64).sum(1), expected[2], rtol=2e-4, atol=1e-8)


@pytest.mark.parametrize("scale", [1e-20, 1e-50])
def test_a_tiny_scale_gives_equal_weights(cuda_attention, scale):
    """The second scale is 0 in float32. A product of 0 and the -Inf of padding would be NaN."""
    case = Case(cuda_attention, 1, 2, 40, scale=scale)
    out, _, sums = case.run()
    expected = case.expected()
    np.testing.assert_allclose(out, expected[0], rtol=2e-2, atol=TOLERANCE["bfloat16"])
    np.testing.assert_allclose(sums.astype(np.float64).sum(1), expected[2], rtol=1e-5)


def unscored_row(packed):
    packed[:, 0, 0] = np.nan  # the class token's query: its output is NaN, no score is


def one_query(packed):
    packed[:, 70, 0] = np.nan


def one_key(packed):
    packed[:, 70, 1, 0] = np.inf


def one_value(packed):
    packed[:, 70, 2, 0, 5] = np.nan


@pytest.mark.parametrize("change", [unscored_row, one_query, one_key, one_value])
def test_nan_and_inf_propagate_as_defined(cuda_attention, change):
    case = Case(cuda_attention, 1, 2, 130, change=change)
    out, _, sums = case.run()
    expected_out, _, expected_scores = case.expected()
    np.testing.assert_array_equal(np.isnan(out), np.isnan(expected_out))
    np.testing.assert_array_equal(np.isnan(sums.sum(1)), np.isnan(expected_scores))
    finite = ~np.isnan(expected_scores)
    np.testing.assert_allclose(sums.sum(1)[finite], expected_scores[finite], rtol=3e-5)


@pytest.mark.parametrize("multiprocessors", ["1", "4", "132"])
def test_blocks_share_the_queries(emulated_attention, monkeypatch, multiprocessors):
    monkeypatch.setenv("EMULATED_MULTIPROCESSORS", multiprocessors)
    case = Case(emulated_attention, 1, 2, 257)
    assert case.parts() == {"1": 1, "4": 2, "132": 4}[multiprocessors]
    out, lse, sums = case.run()
    case.check(out, lse, sums.astype(np.float64).sum(1))


def test_arguments_are_checked(cuda_attention):
    place = (0, 64, 64, 64)

    def call(dtype, tokens, channels, scale, k=place):
        cuda_attention.call(
            "column_mean_attention", dtype, 1, 1, tokens, channels, place, k, place, place, 0, scale, 1, 0, 1
        )

    with pytest.raises(ValueError, match="channels must be 64 on CUDA, got 32"):
        call("float16", 5, 32, 1.0)
    with pytest.raises(ValueError, match="tokens must be at most 576 on CUDA, got 577"):
        call("float16", 577, 64, 1.0)
    with pytest.raises(ValueError, match="dtype must be float16 or bfloat16, got float32"):
        call("float32", 5, 64, 1.0)
    with pytest.raises(ValueError, match="scale must be positive on CUDA, got -1"):
        call("float16", 5, 64, -1.0)
    with pytest.raises(ValueError, match="k: pointer and strides must be multiples of 16 bytes"):
        call("float16", 5, 64, 1.0, k=(2, 64, 64, 64))


def test_a_gpu_with_less_shared_memory_takes_fewer_tokens(emulated_attention, monkeypatch):
    assert emulated_attention.module.cuda_most_tokens(0) == 576
    monkeypatch.setenv("EMULATED_SHARED_LIMIT", str(163 << 10))  # sm_80
    assert emulated_attention.module.cuda_most_tokens(0) == 384
    monkeypatch.setenv("EMULATED_LAUNCH_ERROR", "1")
    with pytest.raises(RuntimeError, match=r"column_mean_attention\(bfloat16, batch=1, heads=1, tokens=385, extra"):
        Case(emulated_attention, 1, 1, 385).run()
