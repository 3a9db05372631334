"""Table I: the metric by keep-rate and ranking of the patches, each cell trained with the same recipe.

    python python/table1.py --rankings attention random --keep-rates 0.7 0.5 --seeds 0 1 2 --output results/table1 \\
        -- --model audiomae --dataset esc50 --init pretrained.pth

What follows -- goes to pruneattn.train. Start the same command again to go on where it was stopped, and several times
at once (on several machines with a common folder, or with another --device each) to share the cells. Writes
table1.csv, .md, .png and .pdf with what is there so far; --report does only that.
"""

import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from pruneattn.analysis.command import save_result
from pruneattn.analysis.table1 import RANKINGS, Table, make_cells, plot_table1, table_lines
from pruneattn.cli import run_command
from pruneattn.errors import UserError
from pruneattn.files import atomic_write, make_folder
from pruneattn.plot import matplotlib_figure


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    own, train = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    args = _parse(own)
    if not train:
        raise UserError("give the options of pruneattn.train after --, such as -- --model ast --dataset esc50")
    matplotlib_figure()
    table = Table(make_folder(args.output), make_cells(args.rankings, args.keep_rates, args.seeds), train)
    code = 0
    while not args.report:
        outcome = table.train_next()
        if outcome == "wait":
            time.sleep(5)  # until other processes are further
        elif outcome != "trained":
            code = outcome if isinstance(outcome, int) else 0
            break
    report(table, args)
    return code


def report(table, args):
    """Write and print what is known so far, and what is missing."""
    rows, missing = table.rows(), table.missing()
    options, _ = table.settings[table.cells[0]]
    name = options.dataset if options.train_manifest is None else Path(options.train_manifest).stem
    title = f"{options.model}_{options.size} on {name}, {len(args.seeds)} seeds"
    lines = [
        title,
        "",
        *table_lines(rows, args.rankings),
        "",
        "Metric in percent, mean over the seeds; in brackets the paired difference to unpruned and its standard error "
        "(* p < 0.05, t-test over the test clips, or over the classes for mAP).",
    ]
    if missing:
        names = ", ".join(cell.name for cell in missing)
        lines.append(f"{len(missing)} of {len(table.cells)} runs are missing: {names}")
    text = "\n".join(lines)
    print(f"\n{text}\n")
    with atomic_write(args.output / "table1.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    save_result(args.output, "table1", rows, plot_table1(rows, args.rankings, title))


def _parse(argv):
    parser = ArgumentParser(
        prog="python python/table1.py",
        usage="%(prog)s [options] -- OPTIONS OF pruneattn.train",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    paper = ("attention", "intensity", "variation")
    parser.add_argument(
        "--rankings", nargs="+", choices=tuple(RANKINGS), default=paper, help=f"(default: {' '.join(paper)})"
    )
    parser.add_argument(
        "--keep-rates",
        nargs="+",
        type=float,
        default=(0.9, 0.8, 0.7, 0.6, 0.5, 0.4),
        metavar="R",
        help="(default: 0.9 to 0.4)",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=(0,), metavar="N", help="(default: 0)")
    parser.add_argument(
        "--output", type=Path, default=Path("results/table1"), metavar="DIR", help="(default: results/table1)"
    )
    parser.add_argument("--report", action="store_true", help="train nothing, only show what there is")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
