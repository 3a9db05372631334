"""The ``pruneattn`` command: ``pruneattn COMMAND ...`` runs the same code as ``python -m pruneattn.COMMAND ...``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from .cli import run_command
from .constants import VERSION
from .errors import unknown

#: The line of each command in ``pruneattn --help``.
COMMANDS = {
    "train": "train a model with token pruning",
    "evaluate": "measure accuracy, MACs and speed at several keep-rates",
    "predict": "label audio files of any length",
    "export": "export a checkpoint to ONNX, torch.export or AOTInductor",
    "convert": "convert a checkpoint to the format of another project",
    "data": "list and download datasets, and compute their statistics",
    "analyze": "compute a table or figure of the paper",
    "backends": "show the available backends of each operator",
}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit with its exit code; errors become one line, see :func:`~pruneattn.cli.run_command`.

    Args:
        argv: the words after ``pruneattn``; None: the words of the command line.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    run_command(lambda: _run(words))


def _run(words: list[str]) -> int | None:
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        raise unknown("command", words[0], COMMANDS)
    _parser().parse_args(words[:1])  # exits for --help and --version, and if there is no command
    return _entry_point(words[0])(words[1:])


def _entry_point(command: str) -> Callable[[list[str]], int | None]:
    """The function that runs a command. Only its module is imported, and only here, because most of them need torch."""
    match command:
        case "train":
            from .train import main as train

            return train
        case "evaluate":
            from .evaluate import main as evaluate

            return evaluate
        case "predict":
            from .predict import main as predict

            return predict
        case "export":
            from .export import main as export

            return export
        case "convert":
            from .convert import main as convert

            return convert
        case "data":
            from .data.__main__ import main as data

            return data
        case "analyze":
            from .analysis.__main__ import main as analyze

            return analyze
        case _:
            return _backends


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pruneattn",
        description="Token pruning for audio transformers.",
        epilog="'pruneattn COMMAND --help' shows the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"pruneattn {VERSION}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser


def _backends(argv: list[str]) -> int:
    argparse.ArgumentParser(
        prog="pruneattn backends",
        description="Show for each operator which backends have a kernel, which one is used, and why other backends "
        "cannot be used on this machine.",
    ).parse_args(argv)
    from .ops.backend import backends

    print(backends())
    return 0


if __name__ == "__main__":
    main()
