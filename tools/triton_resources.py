"""Resources of each Triton kernel on a GPU, compiled ahead of time. Needs no GPU.

    python -m tools.triton_resources

writes `bench/results/triton-resources.csv`: registers, spilled bytes, shared memory, tile sizes and matrix instruction
of each kernel at the sizes of the real models, on every supported architecture.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import mangle_type

from bench.harness.machine import RESULTS
from bench.harness.op_cases import HEADS
from pruneattn.kernels import attention, cls_scores, column_mean_attention, tiles
from pruneattn.kernels import attention_backward as backward
from pruneattn.kernels.launch import SHARED_OUT, Launch, config_for, fit
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


def kernels(
    dtype: torch.dtype,
    channels: int,
    tokens: int,
    batch: int = 1,
    heads: int = HEADS,
    device: torch.device | str = "cpu",
) -> dict[str, tuple[Callable[..., Launch], list[torch.Tensor]]]:
    """Prepare every kernel on random clips, which are views of a packed projection as in a model.

    Returns:
        dict of name -> (function of a `Config` that returns the `Launch`, list of tensors that the kernel writes). In
        this order, each kernel reads what earlier kernels wrote.
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


def launches(dtype: torch.dtype, channels: int, tokens: int, architecture: str) -> Iterator[tuple[str, Launch]]:
    """Yield name and `Launch` of every kernel with the tile sizes for many clips, and for few clips if they differ."""
    for name, (launch, _) in kernels(dtype, channels, tokens).items():
        config = config_for(name, architecture, dtype, tiles.block_channels(channels))
        rows = tokens - 2 + tokens % 2 if name == "column_sums" else tokens
        for fitted in {fit(config, SHARED_OUT[name], HEADS, rows, processors): None for processors in (0, 1000)}:
            yield name, launch(config=fitted)


def compile_for(launch: Launch, architecture: str) -> Any:
    """Compile the kernel of a `Launch` for an architecture. A call on such a GPU then finds it in Triton's cache."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list] = {}
    for place, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(place,)] = value
            continue
        signature[parameter.name] = mangle_type(value)
        whole = 16 if isinstance(value, torch.Tensor) else value  # PyTorch's pointers are multiples of 16
        if isinstance(whole, int):
            attributes[(place,)] = [["tt.divisibility", 16]] if whole % 16 == 0 else []
    source = triton.compiler.ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.config.num_warps, "num_stages": launch.config.num_stages}
    target = (
        GPUTarget("cuda", int(architecture[3:]), 32) if _is_cuda(architecture) else GPUTarget("hip", architecture, 64)
    )
    return triton.compile(source, target=target, options=options)


def _is_cuda(architecture: str) -> bool:
    return architecture.startswith("sm_")


def usage(compiled: Any) -> tuple[int, int]:
    """Registers and spilled bytes of a compiled kernel, from its listing or from the disassembler in Triton's wheel."""
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


def matrix_instruction(listing: str) -> str:
    """Name of the matrix instruction in a listing; ``fma`` if there is none."""
    return next((name for name in ("tcgen05.mma", "wgmma.mma_async", "mma.sync", "mfma") if name in listing), "fma")


def rows_of(case: tuple[torch.dtype, int, int], architecture: str) -> list[tuple]:
    """Make the table's rows of a case, one for each kernel."""
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


def table(
    cases: Sequence[tuple[torch.dtype, int, int]], architectures: Sequence[str] = tuple(MOST_SHARED)
) -> list[tuple]:
    """Compile on all cores, and return all rows."""
    rows: list[tuple] = []
    for is_cuda in (True, False):
        pairs = [(case, name) for case in cases for name in architectures if _is_cuda(name) == is_cuda]
        with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), None if is_cuda else _as_on_rocm) as pool:
            rows += [row for some in pool.map(rows_of, *zip(*pairs)) for row in some]
    return rows


def _as_on_rocm() -> None:
    """Make this process compile the same code as a process with PyTorch for ROCm."""
    tiles._FLOAT32 = tl.constexpr("ieee")


def main(output: str | Path = OUTPUT) -> None:
    """Compile all cases and write the table."""
    write(output, COLUMNS, table(CASES))


if __name__ == "__main__":
    main(*sys.argv[1:])
