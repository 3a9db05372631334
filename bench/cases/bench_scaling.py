"""Time and memory by tokens and by batch: our ops, compared with the whole softmax matrix.

The report fits the exponents. This benchmark measures providers of two other benchmarks at more sizes.
"""

from bench.cases import bench_block, bench_column_mean_attention
from bench.harness.case import left_out
from bench.harness.memory import available
from bench.harness.op_cases import HEADS
from bench.harness.peers import PAPER

LEVELS = ("scaling by tokens", "scaling by batch")
ATTENTION = "column_mean_attention"
EAGER = ("eager", PAPER)


def providers(case, sizes):
    """Our op with the default backend, and providers that store the whole softmax matrix if it fits into memory."""
    if case.subject == ATTENTION:
        found = bench_column_mean_attention.providers(case)
    else:
        found = bench_block.providers(case, sizes._replace(keep_rates=(1.0, sizes.keep_rates[-1]), peer_rates=()))
    ours = next(provider.backend for provider in found if provider.name == "ours")
    chosen = [
        provider for provider in found if provider.name in EAGER or (provider.name, provider.backend) == ("ours", ours)
    ]
    needed = softmax_bytes(case)
    if needed < available(case.device):
        return chosen
    why_not = f"the softmax matrix takes {needed / 2**30:.0f} GiB, more than is free"
    return [
        left_out(provider.name, why_not, backend=provider.backend, keep_rate=provider.keep_rate)
        if provider.name in EAGER
        else provider
        for provider in chosen
    ]


def softmax_bytes(case):
    """Bytes of the logits, the softmax matrix and its mean over heads, with the 12 heads of a base model."""
    return 3 * case.batch * HEADS * case.tokens**2 * case.torch_dtype.itemsize


def test_scaling(measure, case, sizes):
    measure(case, providers(case, sizes))
