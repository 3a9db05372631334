"""Measure the Triton kernels' tile sizes on this GPU:

    python -m tools.tune [--dtype bfloat16] [--head-size 64]

times every kernel with all candidates at 64 clips of 513 tokens and 12 heads, and writes the fastest into
`pruneattn/kernels/configs.json`, from where it is taken on every GPU of this architecture. A result that differs from
that of the tile sizes so far is left out, as is what the GPU has no room for. Before, every core compiles: one after the
other, the 170 kernels would take most of the time.
"""

import argparse
import itertools
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from bench.harness.cuda_clock import rounds_by_events
from bench.harness.guards import WrongResult, check_close
from bench.harness.op_cases import HEADS, TOLERANCE
from pruneattn import kernels as package
from pruneattn.files import atomic_write
from pruneattn.kernels.launch import SHARED_OUT, Config, architecture_of, config_for
from pruneattn.kernels.tiles import block_channels
from tools.triton_resources import compile_for, kernels

BATCH, TOKENS, ROUNDS = 64, 513, 7
TABLE = Path(package.__file__).with_name("configs.json")


def candidates(kernel, dtype):
    """The `Config`s that are tried."""
    if kernel == "cls_weights":
        grid = ((1,), (32, 64, 128, 256), (2, 4, 8), (1, 3))
    elif dtype == torch.float32:
        grid = ((16, 32, 64), (16, 32, 64), (4, 8), (1,))
    else:
        # What is shared out may have 128 rows; where it has 64, eight warps have too little to do.
        grid = ((64, 128), (32, 64, 128), (4, 8), (1, 2, 3, 4))
    shared, other, warps, stages = grid
    for rows, columns, *rest in itertools.product(shared, other, warps, stages):
        if dtype == torch.float32 or rows != 64 or rest[0] == 4:
            yield Config(columns, rows, *rest) if SHARED_OUT[kernel] == "BLOCK_N" else Config(rows, columns, *rest)


def compile_first(dtype, channels, architecture, tokens=TOKENS, heads=HEADS, configs=candidates):
    """Compile all that `tune` measures, on every core: its launches find it in Triton's cache on disk."""
    jobs = []
    for kernel in SHARED_OUT:
        before = config_for(kernel, architecture, dtype, block_channels(channels))
        jobs += [(kernel, config) for config in dict.fromkeys([before, *configs(kernel, dtype)])]
    compile_one = partial(_compile, dtype, channels, architecture, tokens, heads)
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for _ in tqdm(pool.map(compile_one, jobs), desc="compile", total=len(jobs), unit="kernel"):
            pass


def _compile(dtype, channels, architecture, tokens, heads, job):
    kernel, config = job
    launch, _ = kernels(dtype, channels, tokens, heads=heads)[kernel]  # of one clip: only the grid knows of others
    try:
        compile_for(launch(config=config), architecture)
    except Exception:
        pass  # `measure` meets it again, and says so


def measure(kernel, launch, written, configs, before, clock):
    """Seconds of the kernel with each config that gives the result of the one ``before``.

    Args:
        kernel: its name.
        launch: function of a config that returns the `Launch`.
        written: tensors that the kernel writes.
        configs: list of `Config`.
        before: `Config` whose result is right.
        clock: function of a dict of calls that returns a dict of seconds, with the same keys.
    """

    def call(config):
        launch(config=config).run(written[0])

    call(before)
    expected = [tensor.clone() for tensor in written]
    calls = {}
    for config in tqdm(dict.fromkeys([before, *configs]), desc=kernel, unit="config"):
        try:
            call(config)
            for tensor, right in zip(written, expected):
                check_close("the values", tensor, right, TOLERANCE[tensor.dtype])
        except (WrongResult, RuntimeError, OutOfResources, CompilationError) as error:
            tqdm.write(f"{kernel} {config}: left out: {str(error).splitlines()[0]}")
            continue
        calls[config] = partial(call, config)
    seconds = clock(calls)
    call(before)  # what the next kernel reads
    return seconds


def tune(dtype, channels, device, architecture, clock, table=TABLE, sizes=(TOKENS, BATCH, HEADS), configs=candidates):
    """Measure all kernels and write the fastest configs of this architecture into the table; prints what was found.

    ``sizes`` are tokens, clips and heads, ``clock`` and ``configs`` are as `clock` and `candidates` below and above.
    """
    found = {}
    for kernel, (launch, written) in kernels(dtype, channels, *sizes, device).items():
        before = config_for(kernel, architecture, dtype, block_channels(channels))
        seconds = measure(kernel, launch, written, list(configs(kernel, dtype)), before, clock)
        found[kernel] = min(seconds, key=seconds.get)
        print(
            f"{kernel}: {found[kernel]}, {1e6 * seconds[found[kernel]]:.1f} us; "
            f"before: {before}, {1e6 * seconds[before]:.1f} us"
        )
    entries = json.loads(table.read_text(encoding="utf-8"))
    for kernel, config in found.items():
        measured = entries.setdefault(architecture, {}).setdefault(kernel, {})
        measured[f"{str(dtype)[6:]}, {block_channels(channels)}"] = config
    with atomic_write(table) as temporary:
        temporary.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{table}: {architecture}")


def clock(calls):
    """Median seconds of each call, on a cold L2, in turns."""
    seconds, _ = rounds_by_events(calls, ROUNDS)
    return {name: sorted(rounds)[len(rounds) // 2] for name, rounds in seconds.items()}


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tools.tune", description=__doc__.split("\n\n")[0])
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--head-size", type=int, default=64)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA device: torch.cuda.is_available() is False (see nvidia-smi)")
    device = torch.device("cuda", torch.cuda.current_device())
    dtype, channels, architecture = getattr(torch, options.dtype), options.head_size, architecture_of(device)
    compile_first(dtype, channels, architecture)
    tune(dtype, channels, device, architecture, clock)


if __name__ == "__main__":
    main()
