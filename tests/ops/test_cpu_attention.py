"""Properties of the CPU's attention kernels that hold bit for bit."""

import pytest
import torch

from pruneattn import ops

KERNEL_DTYPES = (torch.float32, torch.bfloat16)


def run(q, k, v, extra_tokens=1):
    """All attention ops: their outputs and scores."""
    few = ops.attention(q[:, :, ::3], k, v)
    return few, *ops.column_mean_attention(q, k, v, extra_tokens), ops.cls_scores(q[:, :, 0], k, extra_tokens)


def same_bits(results, expected):
    return all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.fixture
def set_threads():
    threads = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_results_do_not_depend_on_threads(cpu_kernels, cases, set_threads, dtype):
    # Heads divided among threads, one head split, more threads than clips.
    for batch, heads, tokens, channels in ((3, 4, 130, 16), (1, 1, 513, 64), (1, 3, 257, 33)):
        inputs = cases.packed_qkv(batch, heads, tokens, channels, dtype, cpu_kernels)
        set_threads(1)
        expected = run(*inputs)
        for threads in (2, 3):
            set_threads(threads)
            assert same_bits(run(*inputs), expected), threads


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_a_clip_does_not_depend_on_its_batch(cpu_kernels, cases, dtype):
    for heads, tokens, channels in ((2, 6, 5), (4, 130, 16), (1, 513, 64)):
        q, k, v = cases.packed_qkv(4, heads, tokens, channels, dtype, cpu_kernels)
        results = run(q, k, v)
        for clip in (0, 2, 3):
            alone = run(q[clip : clip + 1].contiguous(), k[clip : clip + 1], v[clip : clip + 1].contiguous())
            assert same_bits(alone, (x[clip : clip + 1] for x in results)), (clip, tokens)


def test_a_query_does_not_depend_on_other_queries(cpu_kernels, cases):
    q, k, v = cases.packed_qkv(1, 2, 110, 16, torch.float32, cpu_kernels)
    out = ops.attention(q, k, v)
    for rows in (slice(0, 1), slice(5, 12), slice(90, 110)):
        assert torch.equal(ops.attention(q[:, :, rows], k, v), out[:, :, rows])


def test_empty_batch(cpu_kernels, cases):
    q, k, v = cases.packed_qkv(0, 2, 9, 4, torch.float32, cpu_kernels)
    assert [tuple(x.shape) for x in run(q, k, v)] == [(0, 2, 3, 4), (0, 2, 9, 4), (0, 8), (0, 8)]


def test_simultaneous_calls_from_several_threads(cpu_kernels, cases):
    """Each thread has its own scratch memory."""
    from concurrent.futures import ThreadPoolExecutor

    inputs = [cases.packed_qkv(2, 2, tokens, 16, torch.float32, cpu_kernels) for tokens in (130, 70, 257, 20)]
    expected = [run(*each) for each in inputs]
    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(lambda i: same_bits(run(*inputs[i % 4]), expected[i % 4]), range(24)):
            assert results
