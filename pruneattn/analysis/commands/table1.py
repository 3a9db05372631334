"""``pruneattn analyze table1``: the metric by keep-rate and ranking of the patches (paper, Table I)."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ...cli import add_keep_rates_option
from ...errors import UserError
from ...files import make_folder, write_text
from ...plot import matplotlib_figure
from ...training.engine import Stopped
from ..table1 import RANKINGS, Table, make_cells, plot_table1, table_lines
from .options import add_results_option, make_parser, save_result

_KEEP_RATES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
_PAPER = ("attention", "intensity", "variation")
_LEGEND = (
    "Metric in percent, mean over the seeds; in brackets the paired difference to unpruned and its standard error "
    "(* p < 0.05, t-test over the test clips, or over the classes for mAP)."
)
_SECONDS = 5  # between looks for a cell that can be trained, while other processes train


def main(argv: Sequence[str] | None = None) -> int:
    """Run the analysis with these command-line arguments.

    Returns:
        The exit code: 0, or 128 + the number of the signal that stopped a training.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    own, train = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    args = _parse(own)
    if not train:
        raise UserError("the options of pruneattn train are missing: add them after --, as in -- --model ast")
    matplotlib_figure()  # the table is drawn: fail now if matplotlib is not installed
    table = Table(make_folder(args.output), make_cells(args.rankings, args.keep_rates, args.seeds), train)
    code = 0 if args.report else _train(table)
    _report(table, args)
    return code


def _train(table: Table) -> int:
    """Train the missing cells, and return the exit code."""
    while True:
        try:
            outcome = table.train_next()
        except Stopped as stopped:
            name = signal.Signals(stopped.signum).name
            print(f"stopped by {name}; {stopped}; to resume, run the same command again", flush=True)
            return 128 + stopped.signum
        except KeyboardInterrupt:
            print("stopped before the first step or by a second Ctrl-C; nothing new is saved", flush=True)
            return 128 + signal.SIGINT
        if outcome == "done":
            return 0
        if outcome == "wait":
            time.sleep(_SECONDS)


def _report(table: Table, args: argparse.Namespace) -> None:
    """Write and print the results of the finished cells, and the names of the missing cells."""
    rows, missing = table.rows(), table.missing()
    options, _ = table.settings[table.cells[0]]
    name = options.dataset if options.train_manifest is None else Path(options.train_manifest).stem
    title = f"{options.model}_{options.size} on {name}, {len(args.seeds)} seeds"
    lines = [
        title,
        "",
        *table_lines(rows, args.rankings),
        "",
        _LEGEND,
    ]
    if missing:
        names = ", ".join(cell.name for cell in missing)
        lines.append(f"{len(missing)} of {len(table.cells)} runs are missing: {names}")
    text = "\n".join(lines)
    print(f"\n{text}\n")
    write_text(args.output / "table1.md", text + "\n")
    save_result(args.output, "table1", rows, plot_table1(rows, args.rankings, title))


def _parse(words: list[str]) -> argparse.Namespace:
    parser = make_parser(
        "table1",
        "The options after -- are those of pruneattn train. The same command resumes a stopped table. Several "
        "processes can run it at the same time and share the cells, also on several machines with a common folder. "
        "Writes table1.csv, .md, .png and .pdf from the finished runs.",
        usage="%(prog)s [options] -- OPTIONS OF pruneattn train",
    )
    parser.add_argument(
        "--rankings",
        nargs="+",
        choices=tuple(RANKINGS),
        default=_PAPER,
        help=f"rankings of the patches (default: {' '.join(_PAPER)})",
    )
    add_keep_rates_option(parser, _KEEP_RATES)
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=(0,), metavar="N", help="seeds of the training runs (default: 0)"
    )
    add_results_option(parser, "table1")
    parser.add_argument("--report", action="store_true", help="train nothing, and report the finished runs")
    return parser.parse_args(words)
