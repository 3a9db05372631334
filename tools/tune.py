"""Measure the Triton kernels' tile sizes on this GPU:

    python -m tools.tune [--dtype bfloat16] [--head-size 64]

times every kernel with all candidates at 64 clips of 513 tokens and 12 heads, and writes the fastest tile sizes into
`pruneattn/kernels/configs.json`. Every GPU of this architecture then uses them. Candidates are left out if their result
differs from that of the previous tile sizes, or if they need more resources than the GPU has. All cores compile the 170
kernels first, because compiling them one after the other would take most of the time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
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
from pruneattn.kernels.launch import SHARED_OUT, Config, Launch, architecture_of, config_for
from pruneattn.kernels.tiles import block_channels
from tools.triton_resources import compile_for, kernels

BATCH, TOKENS, ROUNDS = 64, 513, 7
TABLE = Path(package.__file__).with_name("configs.json")


def candidates(kernel: str, dtype: torch.dtype) -> Iterator[Config]:
    """Tile sizes to measure."""
    if kernel == "cls_weights":
        grid = ((1,), (32, 64, 128, 256), (2, 4, 8), (1, 3))
    elif dtype == torch.float32:
        grid = ((16, 32, 64), (16, 32, 64), (4, 8), (1,))
    else:
        # The dimension that programs share may have tiles of 128 rows; with tiles of 64, eight warps are too many.
        grid = ((64, 128), (32, 64, 128), (4, 8), (1, 2, 3, 4))
    shared, other, warps, stages = grid
    for rows, columns, *rest in itertools.product(shared, other, warps, stages):
        if dtype == torch.float32 or rows != 64 or rest[0] == 4:
            yield Config(columns, rows, *rest) if SHARED_OUT[kernel] == "BLOCK_N" else Config(rows, columns, *rest)


def compile_first(
    dtype: torch.dtype,
    channels: int,
    architecture: str,
    tokens: int = TOKENS,
    heads: int = HEADS,
    configs: Callable[[str, torch.dtype], Iterable[Config]] = candidates,
) -> None:
    """Compile everything that `tune` measures on all cores. Its launches then find the kernels in Triton's cache."""
    jobs: list[tuple[str, Config]] = []
    for kernel in SHARED_OUT:
        before = config_for(kernel, architecture, dtype, block_channels(channels))
        jobs += [(kernel, config) for config in dict.fromkeys([before, *configs(kernel, dtype)])]
    compile_one = partial(_compile, dtype, channels, architecture, tokens, heads)
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for _ in tqdm(pool.map(compile_one, jobs), desc="compile", total=len(jobs), unit="kernel"):
            pass


def _compile(
    dtype: torch.dtype, channels: int, architecture: str, tokens: int, heads: int, job: tuple[str, Config]
) -> None:
    kernel, config = job
    launch, _ = kernels(dtype, channels, tokens, heads=heads)[kernel]  # one clip: only the grid depends on the batch
    with suppress(Exception):  # `measure` raises the same error and reports it
        compile_for(launch(config=config), architecture)


def measure(
    kernel: str,
    launch: Callable[..., Launch],
    written: Sequence[torch.Tensor],
    configs: Sequence[Config],
    before: Config,
    clock: Callable[[Mapping], Mapping],
) -> Mapping[Config, float]:
    """Measure a kernel with each config whose result is that of `before`.

    Args:
        kernel: name of the kernel.
        launch: function of a config that returns the `Launch`.
        written: tensors that the kernel writes.
        configs: tile sizes.
        before: tile sizes whose result is correct.
        clock: function of a dict of calls that returns a dict of seconds with the same keys.

    Returns:
        dict of config -> seconds, without the configs that were left out.
    """

    def call(config: Config) -> None:
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
    call(before)  # the next kernel reads its results
    return seconds


def tune(
    dtype: torch.dtype,
    channels: int,
    device: torch.device | str,
    architecture: str,
    clock: Callable[[Mapping], Mapping],
    table: Path = TABLE,
    sizes: tuple[int, int, int] = (TOKENS, BATCH, HEADS),
    configs: Callable[[str, torch.dtype], Iterable[Config]] = candidates,
) -> None:
    """Measure all kernels, print the results, and write the fastest configs of an architecture into the table.

    Args:
        dtype: dtype of the inputs.
        channels: head size.
        device: device to measure on.
        architecture: its entry in the table.
        clock: see `measure`.
        table: the file.
        sizes: tokens, clips and heads.
        configs: function like `candidates`.
    """
    found = {}
    for kernel, (launch, written) in kernels(dtype, channels, *sizes, device).items():
        before = config_for(kernel, architecture, dtype, block_channels(channels))
        seconds = measure(kernel, launch, written, list(configs(kernel, dtype)), before, clock)
        found[kernel] = min(seconds, key=seconds.__getitem__)
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


def clock(calls: Mapping) -> Mapping:
    """Median seconds of each call, in interleaved rounds with a cold L2 cache."""
    seconds, _ = rounds_by_events(calls, ROUNDS)
    return {name: sorted(rounds)[len(rounds) // 2] for name, rounds in seconds.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the options, and tune on the current CUDA device."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.tune", description="Measure the tile sizes of the Triton kernels on this GPU."
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="dtype of the inputs"
    )
    parser.add_argument("--head-size", type=int, default=64, help="channels of a head")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA device: torch.cuda.is_available() is False (see nvidia-smi)")
    device = torch.device("cuda", torch.cuda.current_device())
    dtype, channels, architecture = getattr(torch, options.dtype), options.head_size, architecture_of(device)
    compile_first(dtype, channels, architecture)
    tune(dtype, channels, device, architecture, clock)


if __name__ == "__main__":
    main()
