"""What each Triton kernel takes of a GPU, compiled ahead of time: no GPU is needed.

    python -m tools.triton_resources

writes `bench/results/triton-resources.csv`: registers, spilled bytes, shared memory and tile sizes of each kernel at the
sizes of the real models, for every architecture that is promised, and which matrix instruction it uses.
"""

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import mangle_type

from bench.harness.machine import RESULTS
from bench.harness.op_cases import HEADS
from pruneattn.kernels import attention, cls_scores, column_mean_attention, tiles
from pruneattn.kernels import attention_backward as backward
from pruneattn.kernels.launch import SHARED_OUT, config_for, fit
from tools.resource_table import MOST_SHARED, write

TOKENS = (65, 257, 513, 514)
CASES = [  # dtype, head size, tokens
    *((torch.bfloat16, 64, tokens) for tokens in TOKENS),
    (torch.float16, 64, 513),
    (torch.float32, 64, 513),
    (torch.float32, 128, 513),
    *((torch.bfloat16, channels, 513) for channels in (32, 80, 96, 128)),
]
COLUMNS = (
    "triton",
    "kernel",
    "dtype",
    "head_size",
    "tokens",
    "architecture",
    "block_m",
    "block_n",
    "warps",
    "stages",
    "registers",
    "spilled_bytes",
    "shared_bytes",
    "matrix_instruction",
)
OUTPUT = RESULTS / "triton-resources.csv"


def kernels(dtype, channels, tokens, batch=1, heads=HEADS, device="cpu"):
    """Every kernel on random clips, views of a packed projection as in a model.

    Returns:
        dict of name -> (function of a `Config` that returns the `Launch`, list of what it writes), in an order in which
        each kernel finds what it reads.
    """
    torch.manual_seed(0)
    scale, extra = channels**-0.5, 2 - tokens % 2
    packed = torch.randn(batch, tokens, 3, heads, channels, device=device).to(dtype)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    out, grad_out = torch.randn(2, batch, tokens, heads, channels, device=device).to(dtype).transpose(2, 3).unbind(0)
    grad_q, grad_k, grad_v = torch.empty(3, batch, heads, tokens, channels, dtype=dtype, device=device).unbind(0)
    lse, delta, maximum, inverse, weights = torch.empty(5, batch, heads, tokens, device=device).unbind(0)
    sums = torch.empty(batch, heads, tokens - extra, device=device)
    calls = {
        "attention": (attention.launch, (q, k, v, out, lse, scale, maximum, inverse), [out, lse]),
        "column_sums": (column_mean_attention.launch, (q, k, maximum, inverse, sums, extra, scale), [sums]),
        "grad_queries": (backward.launch_queries, (grad_out, q, k, v, out, lse, grad_q, delta, scale), [grad_q, delta]),
        "grad_keys": (backward.launch_keys, (grad_out, q, k, v, lse, grad_k, grad_v, delta, scale), [grad_k, grad_v]),
        "cls_weights": (cls_scores.launch, (q[:, :, :1], k, weights, scale), [weights]),
    }
    return {name: (partial(launch, *arguments), written) for name, (launch, arguments, written) in calls.items()}


def launches(dtype, channels, tokens, architecture):
    """``(name, Launch)`` of every kernel with the tile sizes for many clips, and those for few where they differ."""
    for name, (launch, _) in kernels(dtype, channels, tokens).items():
        config = config_for(name, architecture, dtype, tiles.block_channels(channels))
        rows = tokens - 2 + tokens % 2 if name == "column_sums" else tokens
        for fitted in {fit(config, SHARED_OUT[name], HEADS, rows, processors): None for processors in (0, 1000)}:
            yield name, launch(config=fitted)


def compile_for(launch, architecture):
    """The compiled kernel of a `Launch`, for a call on a GPU of that architecture, which finds it in Triton's cache."""
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(place,)] = value
            continue
        signature[parameter.name] = mangle_type(value)
        whole = 16 if isinstance(value, torch.Tensor) else value  # pointers of PyTorch are multiples of 16
        if isinstance(whole, int):
            attributes[(place,)] = [["tt.divisibility", 16]] if whole % 16 == 0 else []
    source = triton.compiler.ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.config.num_warps, "num_stages": launch.config.num_stages}
    target = (
        GPUTarget("cuda", int(architecture[3:]), 32) if _is_cuda(architecture) else GPUTarget("hip", architecture, 64)
    )
    return triton.compile(source, target=target, options=options)


def _is_cuda(architecture):
    return architecture.startswith("sm_")


def usage(compiled):
    """(registers, spilled bytes) of a compiled kernel: by its listing, or the disassembler in Triton's wheel."""
    if "amdgcn" in compiled.asm:
        names = ("vgpr_count", "vgpr_spill_count")
        registers, spilled = (int(re.search(rf"\.{name}: +(\d+)", compiled.asm["amdgcn"]).group(1)) for name in names)
        return registers, 4 * spilled
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        run = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    text = run.stdout + run.stderr
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", text).group(1)) for name in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def matrix_instruction(listing):
    """The instruction that multiplies tiles; ``fma`` if there is none for matrices."""
    return next((name for name in ("tcgen05.mma", "wgmma.mma_async", "mma.sync", "mfma") if name in listing), "fma")


def rows_of(case, architecture):
    """A row of the table for each kernel."""
    dtype, channels, tokens = case
    rows = []
    for name, launch in launches(dtype, channels, tokens, architecture):
        compiled = compile_for(launch, architecture)
        registers, spilled = usage(compiled)
        listing = compiled.asm["ptx" if _is_cuda(architecture) else "amdgcn"]
        rows.append(
            (
                triton.__version__,
                name,
                str(dtype)[6:],
                channels,
                tokens,
                architecture,
                *launch.config,
                registers,
                spilled,
                compiled.metadata.shared,
                matrix_instruction(listing),
            )
        )
    return rows


def table(cases, architectures=tuple(MOST_SHARED)):
    """All rows; every core compiles."""
    rows = []
    for is_cuda in (True, False):
        pairs = [(case, name) for case in cases for name in architectures if _is_cuda(name) == is_cuda]
        with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), None if is_cuda else _as_on_rocm) as pool:
            rows += [row for some in pool.map(rows_of, *zip(*pairs)) for row in some]
    return rows


def _as_on_rocm():
    """Make this process, which has another build of PyTorch, compile what ROCm's would."""
    tiles._FLOAT32 = tl.constexpr("ieee")


def main(output=OUTPUT):
    write(output, COLUMNS, table(CASES))


if __name__ == "__main__":
    main(*sys.argv[1:])
