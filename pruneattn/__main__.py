"""The ``pruneattn`` command: ``pruneattn COMMAND ...`` runs the same code as ``python -m pruneattn.COMMAND ...``."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NoReturn

from .cli import run_command
from .constants import VERSION
from .errors import UserError

#: For each command the module whose ``main(argv)`` runs it (None: it is in this file), and its line in the help.
COMMANDS: dict[str, tuple[str | None, str]] = {
    "train": ("pruneattn.train", "training of a model that prunes"),
    "evaluate": ("pruneattn.evaluate", "accuracy, cost and speed of a checkpoint by keep-rate"),
    "predict": ("pruneattn.predict", "labels of sound files of any length"),
    "export": ("pruneattn.export", "a checkpoint as a file for ONNX Runtime or PyTorch"),
    "convert": ("pruneattn.convert", "a checkpoint in the layout of another project"),
    "data": ("pruneattn.data.__main__", "list, download and statistics of datasets"),
    "analyze": ("pruneattn.analysis.__main__", "a table or a figure of the paper, by name"),
    "backends": (None, "the backends that each operator can use on this machine"),
}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit with its exit code; errors become one line, as :func:`~pruneattn.cli.run_command` says.

    Args:
        argv: the words after ``pruneattn``; None: those of the command line.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    run_command(lambda: _run(words))


def _run(words: list[str]) -> int | None:
    command = next(iter(words), "")
    if command and not command.startswith("-") and command not in COMMANDS:
        raise UserError(_unknown(command))
    _parser().parse_args(words[:1])  # exits for --help and --version, and if there is no command
    return _entry_point(command)(words[1:])


def _entry_point(command: str) -> Callable[[list[str]], int | None]:
    """The function that runs a command. Only now are its module and torch imported."""
    module, _ = COMMANDS[command]
    return _backends if module is None else import_module(module).main


def _unknown(command: str) -> str:
    near = difflib.get_close_matches(command.lower(), COMMANDS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"the commands are {', '.join(COMMANDS)}"
    return f"unknown command {command!r}: {hint}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pruneattn",
        description="Token pruning for audio transformers.",
        epilog="'pruneattn COMMAND --help' shows the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"pruneattn {VERSION}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (_, text) in COMMANDS.items():
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
