"""``pruneattn predict``: labels of sound files of any length, and pictures of the patches that pruning keeps."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoints.opening import class_names, describe, fingerprint
from .cli import (
    CommandParser,
    Options,
    add_amp_option,
    add_batch_size_option,
    add_checkpoint_options,
    add_data_dir_option,
    add_device_option,
    add_keep_rate_option,
    add_label_csv_option,
    add_output_option,
    add_trained_for_option,
    add_workers_option,
    check_least,
    open_checkpoint,
    run_command,
)
from .constants import VERSION
from .errors import UserError
from .labelling.corpus import decode_clips, find_clips
from .labelling.label_files import LabelFile, check_label_path
from .labelling.windows import Clip, Labeler
from .labelling.write_labels import Terminal, write_labels
from .runtime import distributed
from .runtime.inference import optimized

if TYPE_CHECKING:
    import torch

    from .models.vit import PrunedViT


def main(argv: Sequence[str] | None = None) -> int:
    """Label clips with these command-line arguments, and return the exit code of ``write_labels``."""
    args = _parse(argv)
    device = distributed.start(args.device)
    model = open_model(args)
    about = describe_labels(model, args)
    labeler = make_labeler(model, device, args)
    if labeler.model.quantization is not None:
        print(labeler.model.quantization, file=sys.stderr)
    paths, failed = find_clips(args.clips, args.data_dir)
    output: Terminal | LabelFile
    if args.output is None:
        output, labeler.windows = Terminal(as_json=False), True  # the text names the number of windows
    elif args.output == Path("-"):
        output = Terminal(as_json=True)
    else:
        output = LabelFile(args.output, about, windows=args.windows)
    draw = _drawing(args.plot, paths, labeler)
    todo = [path for path in paths if path not in output.done]

    def rows() -> Iterator[dict[str, Any]]:
        yield from ({"path": path, "error": reason} for path, reason in failed)
        # Clips are decoded ahead, so that the next batch is ready when the model has finished the current one.
        for clip in labeler.clips(decode_clips(todo, args.workers, ahead=2 * args.batch_size + args.workers)):
            if draw is not None and clip.error is None:
                draw(clip)
            yield labeler.row(clip)

    return write_labels(rows(), len(todo), output)


def open_model(args: argparse.Namespace) -> PrunedViT:
    """Open the checkpoint of the options of ``add_label_options`` on the CPU, with its labels and keep-rate set."""
    model = open_checkpoint(args, args.dataset)
    if args.keep_rate is not None:
        model.set_keep_rate(args.keep_rate)
    model.labels = class_names(model, args.label_csv) or [f"class {number}" for number in range(model.num_classes)]
    return model


def describe_labels(model: PrunedViT, args: argparse.Namespace) -> dict[str, Any]:
    """Everything that the labels depend on, for ``LabelFile``. ``model`` is the result of ``open_model``."""
    return {
        "pruneattn": VERSION,
        "checkpoint": str(args.checkpoint),
        "model": describe(model),
        "sha256": fingerprint(model),
        "keep_rates": list(model.keep_rates),
        "scores": "sigmoid" if model.multilabel else "softmax",
        **{name: getattr(args, name) for name in ("top_k", "overlap", "windows", "amp")},
    }


def make_labeler(model: PrunedViT, device: torch.device, args: argparse.Namespace) -> Labeler:
    """Make the ``Labeler`` of the options of ``add_label_options``. ``model`` is the result of ``open_model``."""
    model, amp = optimized(model, device, args.amp)
    return Labeler(
        model, device, amp=amp, batch_size=args.batch_size, overlap=args.overlap, top_k=args.top_k, windows=args.windows
    )


def add_label_options(parser: Options) -> None:
    """Add the options for the clips to label and for their labels; ``check_label_options`` checks their values."""
    add_checkpoint_options(parser)
    parser.add_argument(
        "clips",
        nargs="+",
        metavar="CLIP",
        help="sound files, folders of sound files, or lists: AST-style manifests (.json), .txt with a path in each "
        "line, .csv with a column 'path', '-' for lines on standard input",
    )
    add_data_dir_option(
        parser,
        "folder that relative paths in lists start from (default: the variable PRUNEATTN_DATA, else the folder of the "
        "list or its parent)",
        default=os.environ.get("PRUNEATTN_DATA"),
    )
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="labels of a clip (default: 5)")
    add_keep_rate_option(parser)
    parser.add_argument(
        "--overlap",
        type=float,
        default=0.5,
        metavar="FRACTION",
        help="fraction of a window that the next window repeats, in [0, 1) (default: 0.5)",
    )
    parser.add_argument("--windows", action="store_true", help="also write the labels of each window")
    add_label_csv_option(parser, "names of the classes")
    add_trained_for_option(parser)
    add_amp_option(parser)
    add_batch_size_option(parser, 16, "windows")


def check_label_options(args: argparse.Namespace) -> None:
    """Raise a ``UserError`` for values of the options of ``add_label_options`` that are out of range."""
    check_least(args, top_k=1, batch_size=1)
    if not 0 <= args.overlap < 1:
        raise UserError(f"--overlap {args.overlap}: must be at least 0 and below 1")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog="pruneattn predict",
        description="Label sound files of any format and length. A clip that is longer than the model's input is cut "
        "into overlapping windows, and their scores are averaged. A shorter clip is padded as in training.",
    )
    add_label_options(parser)
    add_output_option(
        parser,
        "FILE",
        "file for the labels instead of the text: FILE.jsonl, Parquet files in the folder FILE.parquet, or '-' for "
        "JSON lines on standard output; the same command with the same FILE resumes a stopped run",
    )
    add_workers_option(parser)
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="PNG",
        help="picture of the spectrogram and of the patches that each pruning block keeps; for several clips one "
        "picture each, PNG-CLIP.png",
    )
    add_device_option(parser)
    args = parser.parse_args(argv)
    check_label_options(args)
    check_least(args, workers=0)
    if args.plot is not None:
        from .plot import check_plot_path

        check_plot_path(args.plot)
        if not args.plot.absolute().parent.is_dir():
            raise UserError(f"cannot write {args.plot}: the folder {args.plot.parent} does not exist")
    if args.output not in (None, Path("-")):
        check_label_path(args.output)  # before the long work
    return args


def _drawing(path: Path | None, paths: Sequence[str], labeler: Labeler) -> Callable[[Clip], None] | None:
    """Function that draws a predicted clip into its file; None if ``path`` is None."""
    if path is None:
        return None
    from .labelling.pictures import draw_clip, picture_names
    from .plot import save_figure

    names = picture_names(path, paths)

    def draw(clip: Clip) -> None:
        save_figure(draw_clip(labeler.model, clip, labeler.device, labeler.amp), names[clip.path])

    return draw


if __name__ == "__main__":
    run_command(main)
