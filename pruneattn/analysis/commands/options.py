"""Options that the analyses share, and the translation of parsed options into the arguments of the library."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...cli import (
    CommandParser,
    Options,
    add_batch_size_option,
    add_checkpoint_options,
    add_data_options,
    add_device_option,
    add_keep_rate_option,
    add_output_option,
    check_least,
    open_checkpoint,
    open_dataset,
)
from ...files import make_folder, write_csv
from ...plot import matplotlib_figure, save_figure
from ...report import Row, save_failed, say_failed
from ...runtime import distributed
from ..clips import Analysis
from . import ANALYSES

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def make_parser(name: str, files: str, **settings: Any) -> CommandParser:
    """Make the parser of an analysis, without options.

    Args:
        name: a key of ``ANALYSES``.
        files: sentence about the files that the analysis writes, for the help.
        settings: further arguments of the parser.
    """
    return CommandParser(prog=f"pruneattn analyze {name}", description=f"{ANALYSES[name]}. {files}", **settings)


def make_clips_parser(name: str, files: str) -> CommandParser:
    """Make the parser of an analysis of a checkpoint on a dataset, with the options that ``open_analysis`` reads."""
    parser = make_parser(name, files)
    add_checkpoint_options(parser)
    add_data_options(parser)
    run = parser.add_argument_group("run")
    add_results_option(run, name)
    add_device_option(run)
    add_batch_size_option(run, 32)
    run.add_argument(
        "--limit", type=int, metavar="N", help="number of clips, spread evenly over the dataset (default: all)"
    )
    return parser


def add_results_option(parser: Options, name: str) -> None:
    """Add ``--output``: the folder of the results."""
    default = Path("results", name)
    add_output_option(parser, "DIR", f"folder of the results (default: {default})", default=default)


def add_clusters_option(parser: Options, what: str = "clusters.json", **settings: Any) -> None:
    """Add ``--clusters``, which is required; its help text is ``what`` and the source of the file."""
    text = f"{what} of pruneattn analyze clusters"
    parser.add_argument("--clusters", required=True, metavar="JSON", help=text, **settings)


def add_default_keep_rate_option(parser: Options, default: float) -> None:
    """Add ``--keep-rate`` with a default that does not depend on the checkpoint."""
    each = "one number, or one for each pruning block as 0.9,0.7,0.5"
    text = f"fraction of the patches that each pruning block keeps, in (0, 1]: {each} (default: {default:g})"
    add_keep_rate_option(parser, text)
    parser.set_defaults(keep_rate=default)


def open_analysis(args: argparse.Namespace) -> Analysis:
    """Open the checkpoint and the dataset of the options of ``make_clips_parser``, and create the output folder.

    Raises:
        UserError: something is missing or invalid. Nothing has been computed yet.
    """
    check_least(args, batch_size=1, limit=1)
    matplotlib_figure()  # every result is drawn: fail now if matplotlib is not installed
    device = distributed.start(args.device)
    model = open_checkpoint(args, args.dataset)
    dataset = open_dataset(args, model)
    make_folder(args.output)
    name = Path(args.manifest).stem if args.manifest else args.dataset
    fold = f", fold {args.fold}" if args.dataset == "esc50" else ""
    data = f"{name}, {args.split}{fold}"
    return Analysis(model.to(device), dataset, device, data, args.batch_size, args.workers, args.limit)


def save_result(output: Path, name: str, rows: Sequence[Row], figure: Figure) -> None:
    """Write ``NAME.csv`` from rows and ``NAME.png`` and ``NAME.pdf`` from a figure, and print their names."""
    write_csv(output / f"{name}.csv", rows)
    for suffix in ("png", "pdf"):
        save_figure(figure, output / f"{name}.{suffix}")
    print(f"Saved {output / name}.csv, .png and .pdf")


def report_failed(analysis: Analysis, output: Path) -> None:
    """Print the first clips that could not be read, if any, and list all of them in ``failed_clips.txt``."""
    path = save_failed(output, analysis.failed)
    say_failed(analysis.failed, len(analysis.dataset), path)
