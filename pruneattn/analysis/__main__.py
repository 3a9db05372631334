"""``pruneattn analyze NAME`` and ``python -m pruneattn.analysis NAME``: a table or a figure of the paper, by name."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from ..cli import run_command
from ..errors import unknown
from .commands import ANALYSES


def main(argv: Sequence[str] | None = None) -> int | None:
    """Run an analysis, and return its exit code.

    Args:
        argv: name of the analysis and its options; None: the words of the command line.

    Raises:
        UserError: there is no analysis of this name, or it cannot run.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    name = next(iter(words), "")
    if name and not name.startswith("-") and name not in ANALYSES:
        raise unknown("analysis", name, ANALYSES)
    _parser().parse_args(words[:1])  # exits for --help, and if there is no name
    return _entry_point(name)(words[1:])


def _entry_point(name: str) -> Callable[[list[str]], int | None]:
    """The function that runs an analysis. Only its module is imported, and only here, because it needs torch."""
    match name:
        case "table1":
            from .commands.table1 import main as run
        case "table2":
            from .commands.table2 import main as run
        case "clusters":
            from .commands.clusters import main as run
        case "kept_patches":
            from .commands.kept_patches import main as run
        case "kendall":
            from .commands.kendall import main as run
        case "remove_clusters":
            from .commands.remove_clusters import main as run
        case "kept_histogram":
            from .commands.kept_histogram import main as run
        case _:
            from .commands.precision import main as run
    return run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pruneattn analyze",
        description="Compute a table or a figure of the paper, or compare precisions, and write it to results/NAME as "
        "NAME.csv, .png and .pdf.",
        epilog="'pruneattn analyze NAME --help' shows the options of an analysis.",
    )
    names = parser.add_subparsers(title="analyses", metavar="NAME", required=True)
    for name, text in ANALYSES.items():
        names.add_parser(name, help=text, add_help=False)
    return parser


if __name__ == "__main__":
    run_command(main)
