"""No pruning block allocates the N x N matrix, by PyTorch's allocations and by the peak memory of the process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import pruneattn
from pruneattn import use_backend
from pruneattn.models.blocks import PruningBlock
from pruneattn.models.scores import make_pruning

B, H, N, C = 2, 12, 513, 768

# Prints the growth of the peak memory of the process in a block of B=2, H=12, whose matrix would take `matrix` bytes.
PEAK = """
import json, sys, torch
from pruneattn import use_backend
from pruneattn.models.blocks import PruningBlock
from pruneattn.models.scores import make_pruning

def peak():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))

score, backend, tokens = sys.argv[1], sys.argv[2], 1025
block = PruningBlock(96, 12, 0.0, make_pruning(score), 1).eval()
with torch.inference_mode(), use_backend(backend):
    block(torch.randn(2, 65, 96), 0.5)
    x = torch.randn(2, tokens, 96)
    before = peak()
    block(x, 0.5)
print(json.dumps({"growth": peak() - before, "matrix": 2 * 12 * tokens**2 * 4}))
"""


def allocations(score, dtype):
    """The largest allocation in the forward pass of a block, and the peak of allocated memory, in bytes."""
    block = PruningBlock(C, H, 0.0, make_pruning(score), 1).to(dtype).eval()
    x = torch.randn(B, N, C, dtype=dtype)
    with torch.inference_mode():
        return watched(lambda: block(x, 0.5))


def watched(function):
    """The largest allocation while the function runs, and the peak of allocated memory, in bytes."""
    watch = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
    with watch:
        function()
    events = [e for e in watch.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return max(event.nbytes() for event in events), peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score", ["column_mean", "cls"])
def test_no_allocation_is_as_large_as_the_matrix(score, dtype):
    pytest.importorskip("pruneattn._C", reason="pruneattn._C is not built: pip install -e .")
    size = 2 if dtype == torch.bfloat16 else 4  # float16 is computed in float32
    qkv, matrix = 3 * B * N * C * size, B * H * N * N * size
    with use_backend("cpu"):  # the ops allocate, not the kernels of an instruction set
        largest, peak = allocations(score, dtype)
    assert largest <= qkv < matrix / 2
    assert peak <= 7 * B * N * C * size < matrix
    if score == "column_mean":  # the reference allocates the matrix
        with use_backend("reference"):
            largest, peak = allocations(score, dtype)
        assert largest >= matrix and peak >= matrix


def peak_of(function, device):
    """The peak of the memory that PyTorch allocates while the function runs, in bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    return watched(function)[1]


@pytest.mark.parametrize("name", ["audiomae_tiny", "ast_tiny"])
def test_a_training_step_takes_less_memory_with_pruning(any_device, name):
    model = pruneattn.create_model(name, num_classes=4, frames=512).to(any_device)
    fbank = torch.randn(2, 512, 128, device=any_device)

    def step():
        model(fbank).sum().backward()

    step()  # allocates the gradients
    peaks = []
    for keep_rate in (1.0, 0.5):
        model.set_keep_rate(keep_rate)
        peaks.append(peak_of(step, any_device))
    assert peaks[1] < 0.75 * peaks[0]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
@pytest.mark.parametrize("score", ["column_mean", "cls"])
def test_peak_of_the_process_is_below_the_matrix(score):
    """This includes the memory of the kernels, which PyTorch's profiler does not see."""

    def grows(backend):
        path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        run = subprocess.run(
            [sys.executable, "-c", PEAK, score, backend],
            env={**os.environ, "PYTHONPATH": path},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        return json.loads(run.stdout)

    pytest.importorskip("pruneattn._C", reason="pruneattn._C is not built: pip install -e .")
    ours = grows("cpu")
    assert ours["growth"] < ours["matrix"] / 4
    if score == "column_mean":
        reference = grows("reference")
        assert reference["growth"] > reference["matrix"]
