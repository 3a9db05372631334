"""``python -m pruneattn.predict``: labels of sound files of any length, and pictures of what pruning keeps of them."""

import argparse
import os
from pathlib import Path

from .checkpoints.opening import class_names, describe, fingerprint
from .cli import (
    add_checkpoint_options,
    add_keep_rate_option,
    add_trained_for_option,
    check_least,
    open_checkpoint,
    run_command,
)
from .constants import VERSION
from .errors import UserError
from .labelling.corpus import decode_clips, find_clips
from .labelling.label_files import LabelFile, check_label_path
from .labelling.windows import Labeller
from .labelling.write_labels import Terminal, write_labels
from .runtime import distributed
from .runtime.inference import AMP_DTYPES, optimized


def main(argv=None):
    """Predict as the command line says; returns the exit code of ``write_labels``."""
    args = _parse(argv)
    device = distributed.start(args.device)
    model = open_model(args)
    about = describe_labels(model, args)
    labeller = make_labeller(model, device, args)
    paths, failed = find_clips(args.clips, args.data_dir)
    if args.output is None:
        output, labeller.windows = Terminal(as_json=False), True  # the text says how many windows there are
    elif args.output == Path("-"):
        output = Terminal(as_json=True)
    else:
        output = LabelFile(args.output, about, windows=args.windows)
    draw = _drawing(args.plot, paths, labeller)
    todo = [path for path in paths if path not in output.done]

    def rows():
        yield from ({"path": path, "error": reason} for path, reason in failed)
        # Decoding goes on while the model works on a batch, and the next batch is there when it is done.
        for clip in labeller.clips(decode_clips(todo, args.workers, ahead=2 * args.batch_size + args.workers)):
            if draw is not None and clip.error is None:
                draw(clip)
            yield labeller.row(clip)

    return write_labels(rows(), len(todo), output)


def open_model(args):
    """The checkpoint of the options of ``add_label_options``, on the CPU, with ``labels`` and its keep-rate set."""
    model = open_checkpoint(args, args.dataset)
    if args.keep_rate is not None:
        model.set_keep_rate(args.keep_rate)
    model.labels = class_names(model, args.label_csv) or [f"class {number}" for number in range(model.num_classes)]
    return model


def describe_labels(model, args):
    """What decides over the labels, for ``LabelFile``: ``model`` is that of ``open_model``."""
    return {
        "pruneattn": VERSION,
        "checkpoint": str(args.checkpoint),
        "model": describe(model),
        "sha256": fingerprint(model),
        "keep_rates": list(model.keep_rates),
        "scores": "sigmoid" if model.multilabel else "softmax",
        **{name: getattr(args, name) for name in ("top_k", "overlap", "windows", "amp")},
    }


def make_labeller(model, device, args):
    """The ``Labeller`` of the options of ``add_label_options``; ``model`` is that of ``open_model``."""
    model, amp = optimized(model, device, args.amp)
    return Labeller(
        model, device, amp=amp, batch_size=args.batch_size, overlap=args.overlap, top_k=args.top_k, windows=args.windows
    )


def add_label_options(parser):
    """The options that say which clips are labelled and how; ``check_label_options`` looks at their values."""
    add_checkpoint_options(parser)
    parser.add_argument(
        "clips",
        nargs="+",
        metavar="CLIP",
        help="sound files; folders that are searched for them; lists: AST-style manifests (.json), .txt with a path in "
        "each line, .csv with a column 'path', '-' for lines on standard input",
    )
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        default=os.environ.get("PRUNEATTN_DATA"),
        help="where relative paths in lists count from (else the variable PRUNEATTN_DATA, the list's folder or its "
        "parent)",
    )
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="labels to name per clip (default: 5)")
    add_keep_rate_option(parser)
    parser.add_argument(
        "--overlap",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="of a window that the next one repeats, in [0, 1) (default: 0.5)",
    )
    parser.add_argument("--windows", action="store_true", help="name the labels of each window in the output, too")
    parser.add_argument("--label-csv", metavar="CSV", help="names of the classes (index,mid,display_name)")
    add_trained_for_option(parser)
    parser.add_argument("--amp", choices=tuple(AMP_DTYPES), default="fp32", help="precision (default: fp32)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="B", help="windows at once (default: 16)")


def check_label_options(args):
    check_least(args, top_k=1, batch_size=1)
    if not 0 <= args.overlap < 1:
        raise UserError(f"--overlap {args.overlap}: must be at least 0 and below 1")


def _parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m pruneattn.predict",
        description="Labels of sound files of any format and length. What is longer than the model's input is cut into "
        "overlapping windows whose scores are averaged; what is shorter is padded as in training.",
    )
    add_label_options(parser)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="write the labels to FILE.jsonl, to Parquet files in the folder FILE.parquet, or ('-') as JSON lines to "
        "standard output, in place of the text; with FILE the same command goes on where it was stopped",
    )
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that decode (default: 0, this)")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="PNG",
        help="draw the spectrogram and what is kept of it after each pruning stage; of several clips into PNG-CLIP.png",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    args = parser.parse_args(argv)
    check_label_options(args)
    check_least(args, workers=0)
    if args.plot is not None:
        from .plot import check_plot_path

        check_plot_path(args.plot)
        if not args.plot.absolute().parent.is_dir():
            raise UserError(f"cannot write {args.plot}: there is no folder {args.plot.parent}")
    if args.output not in (None, Path("-")):
        check_label_path(args.output)  # before the long work
    return args


def _drawing(path, paths, labeller):
    """Function that draws a predicted clip into its file; None if ``path`` is None."""
    if path is None:
        return None
    from .labelling.pictures import draw_clip, picture_names
    from .plot import save_figure

    names = picture_names(path, paths)

    def draw(clip):
        save_figure(draw_clip(labeller.model, clip, labeller.device, labeller.amp), names[clip.path])

    return draw


if __name__ == "__main__":
    run_command(main)
