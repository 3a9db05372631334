"""The CUDA kernel cls_scores against numpy in float64, for irregular shapes, strides and values."""

import numpy as np
import pytest

DTYPES = ("float32", "float16", "bfloat16")


def store(values, dtype):
    """Numbers as the kernel reads them. bfloat16 is uint16, truncated, which is enough for random input."""
    values = np.asarray(values, np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else values.astype(dtype)


def load(array):
    """The numbers of a stored array in float64."""
    return ((array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array).astype(np.float64)


def expected_partials(q, k, scale, extra_tokens):
    logits = np.einsum("bhd,bnhd->bhn", load(q), load(k)) * scale
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return weights[:, :, extra_tokens:] / q.shape[1]


def places(memory, array, view):
    """Copy an array to the kernel's memory. Return (handle, (pointer, *strides)) of the view, in elements."""
    handle, pointer = memory.put(array)
    offset = view.__array_interface__["data"][0] - array.__array_interface__["data"][0]
    return handle, (pointer + offset, *(stride // view.itemsize for stride in view.strides[:-1]))


def partials_of(cuda, dtype, whole_q, q, whole_k, k, scale, extra_tokens):
    """Partial scores [B, H, P] of ``q`` [B, H, D] and ``k`` [B, N, H, D], which are views of whole arrays."""
    batch, tokens, heads, channels = k.shape
    _q_handle, (q_ptr, q_batch, q_head) = places(cuda.memory, whole_q, q)
    _k_handle, (k_ptr, k_batch, k_token, k_head) = places(cuda.memory, whole_k, k)
    shape = (batch, heads, tokens - extra_tokens)
    out, out_ptr = cuda.memory.put(np.full(int(np.prod(shape)) + 8, -7, np.float32))
    cuda.call(
        "cls_scores",
        dtype,
        batch,
        heads,
        tokens,
        channels,
        (q_ptr, q_batch, q_head, 0),
        (k_ptr, k_batch, k_head, k_token),
        scale,
        extra_tokens,
        out_ptr,
    )
    out = cuda.memory.get(out)
    assert (out[-8:] == -7).all(), "wrote outside its output"
    return out[:-8].reshape(shape)


def check(cuda, dtype, tokens, channels, extra_tokens=1, heads=3, batch=2, scale=None, seed=0):
    """Run the kernel on q and k in one packed array, the output of a model's qkv projection."""
    rng = np.random.default_rng(seed)
    packed = store(rng.standard_normal((batch, tokens, 3, heads, channels)) * 1.5, dtype)
    q, k = packed[:, 0, 0], packed[:, :, 1]
    scale = channels**-0.5 if scale is None else scale
    out = partials_of(cuda, dtype, packed, q, packed, k, scale, extra_tokens)
    np.testing.assert_allclose(out, expected_partials(q, k, scale, extra_tokens), rtol=2e-5, atol=1e-9)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_tokens(cuda, dtype):
    # All numbers up to 2 warps and the ends of larger multiples: a block's loop over tokens has no other boundaries.
    for tokens in [*range(2, 68), *range(94, 99), *range(126, 131)]:
        check(cuda, dtype, tokens, 4 if tokens % 2 else 8, extra_tokens=tokens % min(3, tokens), heads=2, batch=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 8, 20, 33, 64, 80, 128, 256, 300])
def test_head_sizes(cuda, dtype, channels):
    check(cuda, dtype, 67, channels)
    check(cuda, dtype, 35, channels, extra_tokens=0, scale=-0.3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [65, 257, 513, 514])
def test_real_sizes(cuda, dtype, tokens):
    check(cuda, dtype, tokens, 64, extra_tokens=2 - tokens % 2, heads=2, batch=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_maximum_number_of_tokens(cuda, dtype):
    check(cuda, dtype, cuda.module.MAX_TOKENS, 8, extra_tokens=2, heads=1, batch=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_alignments(cuda, dtype):
    """Views whose pointers or strides allow wide accesses, and views that do not, with the same head size."""
    rng = np.random.default_rng(3)
    for offset, width, head_step, token_step in (
        (0, 16, 1, 1),
        (8, 24, 2, 3),
        (1, 24, 1, 1),
        (4, 20, 1, 2),
        (0, 17, 1, 1),
    ):
        whole_q = store(rng.standard_normal((2, 6, width)), dtype)
        whole_k = store(rng.standard_normal((3, 22, 6, width)), dtype)
        q = whole_q[:, : 2 * head_step : head_step, offset : offset + 16]
        k = whole_k[1:, 1::token_step, : 2 * head_step : head_step, offset : offset + 16]
        out = partials_of(cuda, dtype, whole_q, q, whole_k, k, 0.25, 1)
        np.testing.assert_allclose(out, expected_partials(q, k, 0.25, 1), rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [8, 5])
def test_special_values(cuda, dtype, channels):
    """A NaN, a logit of +Inf, or a row of -Inf makes the whole row NaN. A single logit of -Inf gives a weight of 0."""
    rng = np.random.default_rng(4)
    for name, changed in (
        ("nan", np.nan),
        ("inf", np.inf),
        ("-inf", -np.inf),
        ("all -inf", -np.inf),
        ("all nan", np.nan),
    ):
        q = np.abs(rng.standard_normal((2, 2, channels))) + 0.5
        k = rng.standard_normal((2, 70, 2, channels))
        k[0, slice(None) if name.startswith("all") else 66, 1, 3] = changed
        q, k = store(q, dtype), store(k, dtype)
        out = partials_of(cuda, dtype, q, q, k, k, 0.4, 1)
        assert (
            np.isnan(out[0, 1]).all() == (name != "-inf")
            and not np.isnan(out[1]).any()
            and not np.isnan(out[0, 0]).any()
        )
        if name == "-inf":
            assert out[0, 1, 65] == 0 and (out[0, 1, :65] > 0).all()
            np.testing.assert_allclose(out, expected_partials(q, k, 0.4, 1), rtol=2e-5)


def test_large_logits(cuda):
    """Logits that would overflow an exponential. Only their differences matter."""
    check(cuda, "float32", 40, 8, scale=300.0)
    out = check(cuda, "float32", 40, 8, extra_tokens=0, scale=0.0)
    np.testing.assert_array_equal(out, np.full_like(out, np.float32(1 / 120)))


@pytest.mark.parametrize("order", ["reverse", "shuffle"])
def test_result_does_not_depend_on_the_order_of_threads(emulated, monkeypatch, order):
    for dtype in DTYPES:
        for tokens, channels in ((33, 5), (257, 64)):
            monkeypatch.delenv("EMULATED_ORDER", raising=False)
            expected = check(emulated, dtype, tokens, channels, batch=1)
            monkeypatch.setenv("EMULATED_ORDER", order)
            np.testing.assert_array_equal(check(emulated, dtype, tokens, channels, batch=1), expected)


def test_arguments_are_checked(cuda):
    def call(dtype="float32", batch=1, heads=1, tokens=2, channels=4, extra_tokens=1):
        cuda.call("cls_scores", dtype, batch, heads, tokens, channels, *[(0, 0, 0, 0)] * 2, 1.0, extra_tokens, 0)

    call(batch=0)  # an empty batch is accepted
    limit = cuda.module.MAX_TOKENS
    assert limit >= cuda.module.MAX_PATCHES + 2
    with pytest.raises(ValueError, match="dtype must be float32, float16 or bfloat16, got float64"):
        call(dtype="float64")
    with pytest.raises(ValueError, match=f"tokens must be at most {limit} on CUDA, got {limit + 1}"):
        call(tokens=limit + 1)
    with pytest.raises(ValueError, match=r"extra_tokens must be in 0..1, got 2"):
        call(extra_tokens=2)
    with pytest.raises(ValueError, match="expected batch >= 0 and heads, queries, tokens and channels >= 1"):
        call(channels=0)


def test_launch_error_names_kernel_and_shapes(emulated, monkeypatch):
    monkeypatch.setenv("EMULATED_LAUNCH_ERROR", "1")
    with pytest.raises(
        RuntimeError, match=r"CUDA kernel cls_scores\(batch=2, heads=3, tokens=5, channels=4\) could not"
    ):
        check(emulated, "float32", 5, 4)
