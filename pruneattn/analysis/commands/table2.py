"""``pruneattn analyze table2``: MACs and time of one clip by number of patches and keep-rate (paper, Table II)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from ...cli import (
    add_device_option,
    add_frames_option,
    add_keep_rate_option,
    add_keep_rates_option,
    add_model_option,
    add_speed_options,
    add_stride_option,
    check_least,
)
from ...constants import PATCH
from ...errors import UserError
from ...files import make_folder
from ...plot import matplotlib_figure
from ...report import Row
from ...runtime import distributed
from ...runtime.timing import describe_device
from ..table2 import (
    PRINTED_GMACS,
    Timings,
    cell_options,
    count_rows,
    plot_table2,
    speed_rows,
    table_lines,
    time_cell,
)
from .options import add_results_option, make_parser, save_result

_MODELS = ("audiomae_base", "ast_base")

#: Rows of each model and number of frames.
Cells = dict[tuple[str, int], list[Row]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the analysis with these command-line arguments, and return the exit code."""
    args = _parse(argv)
    matplotlib_figure()  # the result is drawn: fail now if matplotlib is not installed
    device = distributed.start(args.device)
    keep_rates = _sweep(args.keep_rate, args.keep_rates)
    cells: Cells = {  # count_rows rejects invalid values before the long work
        (model, frames): count_rows(model, frames, keep_rates, args.stride)
        for model in args.model
        for frames in args.frames
    }
    output = make_folder(args.output)
    if args.rounds:
        _add_speed(cells, Timings(output / "timings.json"), keep_rates, device, args)
    rows = [row for cell in cells.values() for row in cell]
    print("\n".join(table_lines(rows)))
    save_result(output, "table2", rows, plot_table2(rows))
    return 0


def _add_speed(
    cells: Cells, timings: Timings, keep_rates: list[float], device: torch.device, args: argparse.Namespace
) -> None:
    """Measure each cell, unless an earlier run has measured it, and add the speed to its rows."""
    for number, ((model, frames), rows) in enumerate(cells.items(), 1):
        options = cell_options(
            model,
            frames,
            keep_rates,
            describe_device(device),
            batch_size=args.batch_size,
            amp=args.amp,
            rounds=args.rounds,
            compiled=args.compile,
            stride=args.stride,
        )
        speed = timings.find(options)
        name = f"[{number}/{len(cells)}] {model}, {rows[0]['patches']} patches"
        if speed is None:
            print(f"{name}: timing all keep-rates in {args.rounds} interleaved rounds", flush=True)
            speed = time_cell(options, device)
            timings.add(options, speed)
        else:
            print(f"{name}: measured before, from {timings.path}", flush=True)
        cells[model, frames] = speed_rows(rows, speed, options)


def _sweep(keep_rate: float | tuple[float, ...] | list[float] | None, keep_rates: Sequence[float]) -> list[float]:
    """The keep-rates of the table, each once.

    ``--keep-rate`` with several words was a sweep before ``--keep-rates`` existed. It still is one, with a warning: in
    this table all pruning blocks share a keep-rate, so the words cannot be one rate for each block.

    Raises:
        UserError: ``--keep-rate`` has one number for each pruning block.
    """
    if isinstance(keep_rate, tuple):
        words = ",".join(f"{rate:g}" for rate in keep_rate)
        raise UserError(f"--keep-rate {words}: all pruning blocks share a keep-rate in this table: use one number")
    if isinstance(keep_rate, list):
        instead = f"--keep-rates {' '.join(f'{rate:g}' for rate in keep_rate)}"
        print(f"warning: --keep-rate with several values is deprecated: use {instead}", file=sys.stderr)
        keep_rates = keep_rate
    elif keep_rate is not None:
        keep_rates = [keep_rate]
    return list(dict.fromkeys(keep_rates))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(
        "table2",
        "Needs no checkpoint and no data, because MACs and time do not depend on them. Writes table2.csv, .png and "
        ".pdf, and timings.json, from which a stopped run resumes.",
    )
    add_model_option(parser, f"models (default: {' '.join(_MODELS)})", nargs="+", default=_MODELS)
    add_frames_option(
        parser,
        f"10 ms frames of the input; at stride 16, half as many patches (default: {' '.join(map(str, PRINTED_GMACS))})",
        nargs="+",
        default=tuple(PRINTED_GMACS),
    )
    add_stride_option(parser, "16")
    parser.set_defaults(stride=PATCH)
    rates = parser.add_mutually_exclusive_group()
    add_keep_rate_option(
        rates,
        "the only keep-rate of the table, in (0, 1] (several words, 0.7 0.5, are a deprecated form of --keep-rates)",
    )
    add_keep_rates_option(rates, tuple(PRINTED_GMACS[128]))
    run = parser.add_argument_group("run")
    add_results_option(run, "table2")
    add_device_option(run)
    add_speed_options(run, batch_size=8)
    args = parser.parse_args(argv)
    check_least(args, batch_size=1, rounds=0)
    return args
