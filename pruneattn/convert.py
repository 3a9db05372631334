"""``python -m pruneattn.convert``: the weights of any checkpoint in the layout of another project."""

import argparse
from pathlib import Path

from .checkpoints.opening import class_names, describe
from .cli import add_checkpoint_options, add_trained_for_option, open_checkpoint, run_command
from .errors import UserError


def main(argv=None):
    """Convert as the command line says."""
    args = _parse(argv)
    # After the options, so that --help and a wrong option answer at once.
    from .checkpoints.save_checkpoint import save_checkpoint
    from .checkpoints.state_files import find_file

    _keep_input(args.checkpoint, find_file(args.checkpoint), args.output)
    model = open_checkpoint(args, args.dataset)
    labels = class_names(model, args.label_csv)
    save_checkpoint(model, args.output, format=args.format, labels=labels)
    print(f"{args.output}: {describe(model)}, as {args.format}")


def _keep_input(checkpoint, weights, output):
    """Refuse to write over anything that the input is made of, also by way of a link."""
    if not output.exists():
        return
    replaced = [path for path in output.iterdir() if path.exists()] if output.is_dir() else [output]
    beside = output.is_file() and Path(checkpoint).is_dir() and output.parent.samefile(checkpoint)
    if beside or any(path.samefile(weights) for path in replaced):
        raise UserError(f"{output} is part of the checkpoint {checkpoint}, which stays as it is; choose another place")


def _parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m pruneattn.convert",
        description="Write a checkpoint of any known format in the layout of another project, weights bit for bit. "
        "Other projects' models compute every patch until pruneattn.prune changes them.",
    )
    add_checkpoint_options(parser)
    parser.add_argument("output", metavar="OUT", type=Path, help="file (ast, audiomae) or folder to write")
    parser.add_argument(
        "--format",
        required=True,
        choices=("ast", "audiomae", "huggingface", "timm"),
        help="ast: the official AST, a file; audiomae: the official AudioMAE, a file; huggingface: AST for "
        "transformers, a folder; timm: AudioMAE for timm.create_model, a folder",
    )
    parser.add_argument("--label-csv", metavar="CSV", help="names of the classes (index,mid,display_name)")
    add_trained_for_option(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
