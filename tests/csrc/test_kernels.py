"""select, gather, prune and prune_epilogue of each implementation against numpy, for irregular shapes and values."""

import numpy as np
import pytest

PATCHES = [1, 2, 31, 32, 33, 63, 64, 100, 255, 256, 257, 512, 513, 1000, 1024, 1025, 4095, 4096]


def expected_index(scores, keep):
    """The numbers of the `keep` largest scores, ascending. Ties keep the lower number, NaN is the largest."""
    nan = np.isnan(scores)
    # lexsort is stable, and its last key is the primary key.
    order = np.lexsort((-np.where(nan, 0, scores), ~nan), axis=1)
    return np.sort(order[:, :keep], axis=1)


def expected_rows(x, index, extra_tokens):
    return np.stack([np.concatenate([clip[:extra_tokens], clip[extra_tokens:][i]]) for clip, i in zip(x, index)])


def expected_sums(partials):
    """The sum over the rows in float32, from the first to the last row, equal to the bit."""
    total = partials[:, 0]
    with np.errstate(invalid="ignore"):
        for row in range(1, partials.shape[1]):
            total = total + partials[:, row]
    return total


def keeps(patches):
    return sorted({1, (patches + 1) // 2, int(np.ceil(0.7 * patches)), patches})


def scores_like_attention(rng, batch, patches):
    return rng.dirichlet(np.ones(patches), batch).astype(np.float32)


def random_rows(rng, batch, tokens, row_bytes):
    return rng.integers(0, 256, (batch, tokens, row_bytes), dtype=np.uint8)


@pytest.mark.parametrize("patches", PATCHES)
def test_select_scores_of_softmax(kernels, patches):
    scores = scores_like_attention(np.random.default_rng(patches), 2, patches)
    for keep in keeps(patches):
        np.testing.assert_array_equal(kernels.select(scores, keep), expected_index(scores, keep))


@pytest.mark.parametrize(
    "values",
    [
        [0.5],
        [0.25, 0.5],
        [0.0, -0.0],
        [-0.0, 1e-45, -1e-45, 0.0],
        [np.inf, -np.inf, 0.0],
        [np.nan, -np.nan, np.inf, 3e38, 1.0],
        [np.nan, -np.inf],
        [-1.0, -2.0, -3.0, 3.0],
        [1.0, np.nextafter(np.float32(1), np.float32(2)), np.nextafter(np.float32(1), np.float32(0))],
    ],
)
@pytest.mark.parametrize("patches", [33, 64, 513, 1300])
def test_select_ties_and_special_values(kernels, values, patches):
    rng = np.random.default_rng(7)
    scores = rng.choice(np.array(values, np.float32), (3, patches))
    for keep in [*keeps(patches), max(1, patches // 3)]:
        np.testing.assert_array_equal(kernels.select(scores, keep), expected_index(scores, keep))


def test_select_any_bits(kernels):
    bits = np.random.default_rng(3).integers(0, 2**32, (8, 300), dtype=np.uint32)
    scores = bits.view(np.float32)
    for keep in (1, 37, 150, 299):
        np.testing.assert_array_equal(kernels.select(scores, keep), expected_index(scores, keep))


def test_select_strided_batch(kernels):
    scores = np.random.default_rng(4).standard_normal((3, 130)).astype(np.float32)
    _handle, pointer = kernels.memory.put(scores)
    index, index_ptr = kernels.memory.put(np.zeros((3, 20), np.int64))
    kernels.call("select_tokens", pointer + 2 * 4, 3, 100, 130, 20, index_ptr)
    np.testing.assert_array_equal(kernels.memory.get(index), expected_index(scores[:, 2:102], 20))


def test_an_empty_batch_is_accepted(kernels):
    kernels.call("select_tokens", 0, 0, 8, 8, 3, 0)
    kernels.call("gather_tokens", 0, 0, 8, 3, 1, [(0, 0, 64, 8, 8)])


@pytest.mark.parametrize(
    "row_bytes,shift",
    [
        *[(row_bytes, 0) for row_bytes in (1, 2, 3, 4, 6, 8, 16, 20, 1536, 4112, 9000)],
        *[(32, 1), (32, 2), (32, 4), (48, 8), (7, 1)],
    ],
)
def test_gather_row_sizes_and_alignments(kernels, row_bytes, shift):
    rng = np.random.default_rng(row_bytes)
    x = random_rows(rng, 2, 42, row_bytes)
    index = expected_index(rng.random((2, 40)), 27)
    (out,) = kernels.gather([x], index, 2, shift)
    np.testing.assert_array_equal(out, expected_rows(x, index, 2))


def test_gather_any_order_and_repeats(kernels):
    rng = np.random.default_rng(5)
    x = random_rows(rng, 3, 65, 24)
    index = rng.integers(0, 64, (3, 64))
    (out,) = kernels.gather([x], index, 1)
    np.testing.assert_array_equal(out, expected_rows(x, index, 1))


@pytest.mark.parametrize("patches", [1, 33, 64, 256, 513, 1000])
@pytest.mark.parametrize("extra_tokens", [0, 1, 2])
def test_prune_is_select_then_gather(kernels, patches, extra_tokens):
    rng = np.random.default_rng(patches)
    scores = scores_like_attention(rng, 2, patches)
    # Rows of different sizes and alignments in one call, as tensors of different types have.
    tensors = [random_rows(rng, 2, extra_tokens + patches, size) for size in (48, 6, 96, 5)]
    keep = int(np.ceil(0.7 * patches))
    index, outs = kernels.prune(scores, tensors, keep, extra_tokens)
    np.testing.assert_array_equal(index, expected_index(scores, keep))
    for out, x in zip(outs, tensors):
        np.testing.assert_array_equal(out, expected_rows(x, index, extra_tokens))


def test_rows_may_be_strided(kernels):
    rng = np.random.default_rng(6)
    x = random_rows(rng, 2, 20, 48)  # rows: bytes 16..40 of each token of every other pair of tokens
    _handle, pointer = kernels.memory.put(x)
    index = np.array([[0, 3, 9], [1, 2, 8]])
    _index_handle, index_ptr = kernels.memory.put(index)
    out, out_ptr = kernels.memory.put(np.zeros((2, 3, 24), np.uint8))
    kernels.call("gather_tokens", index_ptr, 2, 10, 3, 0, [(pointer + 16, out_ptr, 20 * 48, 2 * 48, 24)])
    np.testing.assert_array_equal(kernels.memory.get(out), expected_rows(x[:, ::2, 16:40], index, 0))


@pytest.mark.parametrize("multiprocessors", ["1", "132"])
@pytest.mark.parametrize("order", ["reverse", "shuffle"])
def test_cuda_result_does_not_depend_on_order_and_split(emulated, monkeypatch, order, multiprocessors):
    monkeypatch.setenv("EMULATED_ORDER", order)
    monkeypatch.setenv("EMULATED_MULTIPROCESSORS", multiprocessors)
    rng = np.random.default_rng(8)
    for patches in (64, 513, 2000):
        scores = rng.choice(scores_like_attention(rng, 1, patches // 2)[0], (2, patches))  # with ties
        x = random_rows(rng, 2, patches + 1, 16)
        index, (out,) = emulated.prune(scores, [x], patches // 2, 1)
        np.testing.assert_array_equal(index, expected_index(scores, patches // 2))
        np.testing.assert_array_equal(out, expected_rows(x, index, 1))


def test_cpu_result_does_not_depend_on_threads(cpu):
    rng = np.random.default_rng(9)
    scores = np.round(rng.random((100, 700)), 2).astype(np.float32)
    x = random_rows(rng, 100, 702, 96)
    for threads in (1, 2, 3, 8):
        cpu.last = (threads,)
        index, (out,) = cpu.prune(scores, [x], 350, 2)
        np.testing.assert_array_equal(index, expected_index(scores, 350))
        np.testing.assert_array_equal(out, expected_rows(x, index, 2))


def test_cpu_takes_any_number_of_patches(cpu):
    scores = np.random.default_rng(10).standard_normal((2, 20000)).astype(np.float32)
    np.testing.assert_array_equal(cpu.select(scores, 7000), expected_index(scores, 7000))


@pytest.mark.parametrize("bad", [-1, 10, 2**40])
def test_cpu_index_out_of_range(cpu, bad):
    index = np.array([[0, 1], [2, bad]])
    with pytest.raises(IndexError, match=rf"index\[1, 1\] is {bad}, expected a patch number in 0..9"):
        cpu.gather([np.zeros((2, 11, 8), np.uint8)], index, 1)


def test_cuda_index_out_of_range_gives_zeros(cuda):
    x = random_rows(np.random.default_rng(11), 2, 11, 32)
    (out,) = cuda.gather([x], np.array([[0, -1, 9], [10, 2, 2**40]]), 1)
    expected = expected_rows(x, np.array([[0, 0, 9], [0, 2, 0]]), 1)
    expected[0, 2] = expected[1, 1] = expected[1, 3] = 0
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("keep", [0, 9, -1])
def test_keep_is_checked(kernels, keep):
    with pytest.raises(ValueError, match=rf"keep must be in 1..8 .*, got {keep}"):
        kernels.call("select_tokens", 0, 1, 8, 8, keep, 0)
    with pytest.raises(ValueError, match=rf"keep must be in 1..8 .*, got {keep}"):
        kernels.call("gather_tokens", 0, 1, 8, keep, 0, [(0, 0, 8, 8, 8)])


def test_other_arguments_are_checked(kernels):
    row = (0, 0, 8, 8, 8)
    with pytest.raises(ValueError, match="patches must be at least 1, got 0"):
        kernels.call("select_tokens", 0, 1, 0, 0, 1, 0)
    with pytest.raises(ValueError, match="batch must not be negative, got -1"):
        kernels.call("select_tokens", 0, -1, 8, 8, 1, 0)
    for rows in ([], [row] * 5):
        with pytest.raises(ValueError, match=rf"rows must describe 1..4 tensors, got {len(rows)}"):
            kernels.call("gather_tokens", 0, 1, 8, 4, 0, rows)
        with pytest.raises(ValueError, match=rf"rows must describe 1..4 tensors, got {len(rows)}"):
            kernels.call("prune_tokens", 0, 1, 8, 8, 4, 0, 0, rows)
    with pytest.raises(ValueError, match="row_bytes of tensor 1 must be in 1..2147483647, got 0"):
        kernels.call("gather_tokens", 0, 1, 8, 4, 0, [row, (0, 0, 8, 8, 0)])
    with pytest.raises(ValueError, match="extra_tokens must not be negative, got -1"):
        kernels.call("gather_tokens", 0, 1, 8, 4, -1, [row])
    with pytest.raises(TypeError, match="scores_ptr: "):
        kernels.call("select_tokens", "x", 1, 8, 8, 1, 0)


def test_cpu_threads_are_checked(cpu):
    cpu.last = (0,)
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        cpu.call("select_tokens", 0, 1, 8, 8, 1, 0)


def test_cuda_limit_of_patches(cuda):
    assert cuda.module.MAX_PATCHES == 4096
    with pytest.raises(ValueError, match="patches must be at most 4096 on CUDA, got 4097"):
        cuda.call("select_tokens", 0, 1, 4097, 4097, 1, 0)
    with pytest.raises(ValueError, match="patches must be at most 4096 on CUDA, got 4097"):
        cuda.call("gather_tokens", 0, 1, 4097, 1, 0, [(0, 0, 8, 8, 8)])


def test_cuda_launch_error_names_kernel_and_shapes(emulated, monkeypatch):
    monkeypatch.setenv("EMULATED_LAUNCH_ERROR", "1")
    scores, x = np.zeros((2, 8), np.float32), np.zeros((2, 9, 16), np.uint8)
    with pytest.raises(
        RuntimeError,
        match=r"CUDA kernel select_tokens\(batch=2, patches=8, keep=3\) could not be "
        r"launched: invalid configuration argument",
    ):
        emulated.select(scores, 3)
    with pytest.raises(
        RuntimeError,
        match=r"prune_epilogue\(batch=2, patches=8, keep=3, extra_tokens=1, "
        r"row_bytes=\[16, 16\]\) could not be launched",
    ):
        emulated.prune(scores, [x, x], 3, 1)
    emulated.last = (7, 0)
    with pytest.raises(RuntimeError, match=r"cudaSetDevice\(7\): invalid device ordinal"):
        emulated.select(scores, 3)


def check_prune_sums(cuda, partials, keep, extra_tokens=1, row_bytes=(16, 6)):
    batch, _, patches = partials.shape
    rng = np.random.default_rng(0)
    tensors = [random_rows(rng, batch, extra_tokens + patches, size) for size in row_bytes]
    scores, index, outs = cuda.prune_sums(partials, tensors, keep, extra_tokens)
    expected = expected_sums(partials)
    np.testing.assert_array_equal(scores, expected)
    np.testing.assert_array_equal(index, expected_index(expected, keep))
    for out, x in zip(outs, tensors):
        np.testing.assert_array_equal(out, expected_rows(x, index, extra_tokens))


def parts_of_scores(rng, batch, rows, patches):
    """Positive rows with similar sums, like the weights of heads."""
    return (rng.dirichlet(np.ones(patches), (batch, rows)) / rows).astype(np.float32)


@pytest.mark.parametrize("rows", [1, 2, 3, 12, 37])
@pytest.mark.parametrize("patches", [1, 31, 64, 100, 257, 512, 513, 1023, 1030])
def test_prune_sums_of_rows(cuda, rows, patches):
    partials = parts_of_scores(np.random.default_rng(patches), 2, rows, patches)
    for keep in sorted({1, int(np.ceil(0.7 * patches)), patches}):
        check_prune_sums(cuda, partials, keep, extra_tokens=keep % 3)


def test_prune_sums_of_a_row_per_block_of_queries(cuda):
    check_prune_sums(cuda, parts_of_scores(np.random.default_rng(1), 2, 108, 512), 359)


def test_prune_sums_match_float64_up_to_rounding(cuda):
    partials = parts_of_scores(np.random.default_rng(2), 2, 37, 130)
    scores, _, _ = cuda.prune_sums(partials, [np.zeros((2, 130, 4), np.uint8)], 3, 0)
    np.testing.assert_allclose(scores, partials.astype(np.float64).sum(1), rtol=3e-6)


@pytest.mark.parametrize("rows", [1, 3, 17])
def test_prune_sums_with_ties_and_special_values(cuda, rows):
    rng = np.random.default_rng(rows)
    for values in ([0.5], [0.25, 0.5], [0.0, -0.0], [np.nan, 1.0], [np.inf, -np.inf, 0.0], [3e38, -3e38, 1e-45]):
        partials = rng.choice(np.array(values, np.float32), (2, rows, 300))
        with np.errstate(over="ignore"):
            for keep in (1, 150, 300):
                check_prune_sums(cuda, partials, keep)


def test_prune_sums_keep_the_sign_of_zero(cuda):
    """The sum of a single row is equal to the row, to the bit."""
    partials = np.array([[[-0.0, 0.0, 1.0]]], np.float32)
    scores, _, _ = cuda.prune_sums(partials, [np.zeros((1, 3, 4), np.uint8)], 1, 0)
    np.testing.assert_array_equal(np.signbit(scores), [[True, False, False]])


def test_prune_sums_of_strided_rows(cuda):
    """A view of a larger array: columns 2 to 102 of rows of 130, with clips 7 rows apart."""
    memory = np.random.default_rng(4).standard_normal((3, 7, 130)).astype(np.float32)
    _handle, pointer = cuda.memory.put(memory)
    scores, scores_ptr = cuda.memory.put(np.zeros((3, 100), np.float32))
    index, index_ptr = cuda.memory.put(np.zeros((3, 20), np.int64))
    _x, x_ptr = cuda.memory.put(np.zeros((3, 100, 4), np.uint8))
    _out, out_ptr = cuda.memory.put(np.zeros((3, 20, 4), np.uint8))
    cuda.call(
        "prune_epilogue",
        pointer + 2 * 4,
        3,
        5,
        100,
        7 * 130,
        130,
        20,
        scores_ptr,
        index_ptr,
        0,
        [(x_ptr, out_ptr, 400, 4, 4)],
    )
    expected = expected_sums(memory[:, :5, 2:102])
    np.testing.assert_array_equal(cuda.memory.get(scores), expected)
    np.testing.assert_array_equal(cuda.memory.get(index), expected_index(expected, 20))


def test_prune_sums_are_optional_outputs(cuda):
    partials = parts_of_scores(np.random.default_rng(5), 2, 3, 70)
    scores, index, _ = cuda.prune_sums(partials, [np.zeros((2, 70, 4), np.uint8)], 9, 0, write=False)
    assert scores is None
    np.testing.assert_array_equal(index, expected_index(expected_sums(partials), 9))


@pytest.mark.parametrize("multiprocessors", ["1", "132"])
@pytest.mark.parametrize("order", ["reverse", "shuffle"])
def test_prune_sums_do_not_depend_on_order_and_split(emulated, monkeypatch, order, multiprocessors):
    monkeypatch.setenv("EMULATED_ORDER", order)
    monkeypatch.setenv("EMULATED_MULTIPROCESSORS", multiprocessors)
    rng = np.random.default_rng(6)
    for rows, patches in ((12, 64), (3, 513), (2, 2000)):
        check_prune_sums(
            emulated, rng.choice(parts_of_scores(rng, 1, rows, patches // 2)[0, 0], (2, rows, patches)), patches // 2
        )


def test_prune_sums_arguments_are_checked(cuda):
    rows = [(0, 0, 8, 8, 8)]
    for bad in (0, 2**31):
        with pytest.raises(ValueError, match=f"partial_rows must be in 1..2147483647, got {bad}"):
            cuda.call("prune_epilogue", 0, 1, bad, 8, 8, 8, 4, 0, 0, 0, rows)
    with pytest.raises(ValueError, match="patches must be at most 4096 on CUDA, got 4097"):
        cuda.call("prune_epilogue", 0, 1, 1, 4097, 8, 8, 4, 0, 0, 0, rows)
    with pytest.raises(ValueError, match="extra_tokens must not be negative, got -1"):
        cuda.call("prune_epilogue", 0, 1, 1, 8, 8, 8, 4, 0, 0, -1, rows)
    cuda.call("prune_epilogue", 0, 0, 1, 8, 8, 8, 4, 0, 0, 0, rows)  # an empty batch is accepted


@pytest.mark.device
def test_device_graph_replays_prune(device):
    """The kernel neither allocates nor synchronizes, so a graph can capture it. A replay reads the new scores."""
    import torch

    scores = torch.rand(4, 513, device="cuda")
    x = torch.randn(4, 514, 64, device="cuda")
    index = torch.empty(4, 300, dtype=torch.int64, device="cuda")
    out = torch.empty(4, 301, 64, device="cuda")

    def run():
        device.module.cuda_prune_tokens(
            scores.data_ptr(),
            4,
            513,
            513,
            300,
            index.data_ptr(),
            1,
            [(x.data_ptr(), out.data_ptr(), 514 * 256, 256, 256)],
            0,
            torch.cuda.current_stream().cuda_stream,
        )

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    scores.copy_(torch.rand(4, 513, device="cuda"))
    graph.replay()
    expected = expected_index(scores.cpu().numpy(), 300)
    np.testing.assert_array_equal(index.cpu().numpy(), expected)
    np.testing.assert_array_equal(out.cpu().numpy(), expected_rows(x.cpu().numpy(), expected, 1))
