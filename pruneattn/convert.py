"""``pruneattn convert``: the weights of any checkpoint in the layout of another project."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .checkpoints.opening import class_names, describe
from .cli import (
    CommandParser,
    add_checkpoint_options,
    add_format_option,
    add_label_csv_option,
    add_trained_for_option,
    open_checkpoint,
    run_command,
)
from .errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Convert a checkpoint with these command-line arguments, and return the exit code."""
    args = _parse(argv)
    # Imported after parsing, so that --help and invalid options answer quickly.
    from .checkpoints.save_checkpoint import save_checkpoint
    from .checkpoints.state_files import find_file

    _check_output(args.checkpoint, find_file(args.checkpoint), args.output)
    model = open_checkpoint(args, args.dataset)
    labels = class_names(model, args.label_csv)
    save_checkpoint(model, args.output, format=args.format, labels=labels)
    print(f"{args.output}: {describe(model)}, as {args.format}")
    return 0


def _check_output(checkpoint: str, weights: str | Path, output: Path) -> None:
    """Raise a ``UserError`` if writing ``output`` would replace a part of the input, directly or through a link."""
    if not output.exists():
        return
    replaced = [path for path in output.iterdir() if path.exists()] if output.is_dir() else [output]
    inside = output.is_file() and Path(checkpoint).is_dir() and output.parent.samefile(checkpoint)
    if inside or any(path.samefile(weights) for path in replaced):
        raise UserError(f"{output} is part of the checkpoint {checkpoint} and is not overwritten; choose another path")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog="pruneattn convert",
        description="Write a checkpoint of any known format in the layout of another project, with identical weights. "
        "Models of other projects compute every patch until pruneattn.prune changes them.",
    )
    add_checkpoint_options(parser)
    parser.add_argument("output", metavar="OUT", type=Path, help="file (ast, audiomae) or folder to write")
    add_format_option(
        parser,
        ("ast", "audiomae", "huggingface", "timm"),
        "layout: ast (official AST, a file), audiomae (official AudioMAE, a file), huggingface (AST for transformers, "
        "a folder) or timm (AudioMAE for timm.create_model, a folder)",
    )
    add_label_csv_option(parser, "names of the classes")
    add_trained_for_option(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
