"""Table II: GMACs of one clip by patches and keep-rate, and how much of the saving the clock shows.

    python python/table2.py --model audiomae_base ast_base --frames 128 512 1024 --batch-size 8

Needs no checkpoint and no data: time depends on neither. Writes table2.csv, table2.png and .pdf, and timings.json,
where a run that was stopped finds what it had measured.
"""

import argparse

from pruneattn.analysis.command import add_run_options, save_result
from pruneattn.analysis.table2 import (
    PRINTED_GMACS,
    Timings,
    cell_options,
    count_rows,
    plot_table2,
    speed_rows,
    table_lines,
    time_cell,
)
from pruneattn.cli import add_speed_options, check_least, run_command
from pruneattn.files import make_folder
from pruneattn.plot import matplotlib_figure
from pruneattn.runtime import distributed
from pruneattn.runtime.timing import describe_device


def main(argv=None):
    args = parse(argv)
    matplotlib_figure()  # the result is drawn: say now if that cannot be
    device = distributed.start(args.device)
    keep_rates = list(dict.fromkeys(args.keep_rate))
    cells = {
        (model, frames): count_rows(model, frames, keep_rates)  # refuses what cannot be, before the long work
        for model in args.model
        for frames in args.frames
    }
    output = make_folder(args.output)
    if args.rounds:
        timings = Timings(output / "timings.json")
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
            )
            speed = timings.find(options)
            name = f"[{number}/{len(cells)}] {model}, {rows[0]['patches']} patches"
            if speed is None:
                print(f"{name}: timing all keep-rates side by side, {args.rounds} rounds", flush=True)
                speed = time_cell(options, device)
                timings.add(options, speed)
            else:
                print(f"{name}: measured before, from {timings.path}", flush=True)
            cells[model, frames] = speed_rows(rows, speed, options)
    rows = [row for cell in cells.values() for row in cell]
    print("\n".join(table_lines(rows)))
    save_result(output, "table2", rows, plot_table2(rows))


def parse(argv):
    keep_rates = tuple(PRINTED_GMACS[128])
    parser = argparse.ArgumentParser(prog="python python/table2.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model",
        nargs="+",
        default=("audiomae_base", "ast_base"),
        metavar="NAME",
        help="models (default: audiomae_base ast_base)",
    )
    parser.add_argument(
        "--frames",
        type=int,
        nargs="+",
        default=tuple(PRINTED_GMACS),
        metavar="F",
        help="10 ms frames of their input, half as many patches as frames "
        f"(default: {' '.join(map(str, PRINTED_GMACS))})",
    )
    parser.add_argument(
        "--keep-rate",
        type=float,
        nargs="+",
        default=keep_rates,
        metavar="R",
        help=f"shares of patches kept at each pruning block, in (0, 1] (default: {' '.join(map(str, keep_rates))})",
    )
    add_run_options(parser, "table2")
    add_speed_options(parser, batch_size=8)
    args = parser.parse_args(argv)
    check_least(args, batch_size=1, rounds=0)
    return args


if __name__ == "__main__":
    run_command(main)
