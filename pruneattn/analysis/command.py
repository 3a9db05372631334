"""What the scripts in ``python/`` share: options, opening of checkpoint and data, and saving of what they found."""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from ..cli import add_checkpoint_options, add_data_options, check_least, open_checkpoint, open_dataset
from ..data.loader import eval_batches
from ..errors import UserError
from ..files import make_folder, write_csv
from ..plot import matplotlib_figure, save_figure
from ..report import save_failed, say_failed
from ..runtime import distributed


class Analysis(NamedTuple):
    """An opened checkpoint with the data to analyse it on.

    Attributes:
        model: ``PrunedViT`` on ``device``, in eval mode, with ``features`` and ``labels``.
        dataset: ``ClipDataset`` with the model's classes.
        device: ``torch.device``.
        output: folder for the results.
        args: the parsed options.
        failed: list of ``(path, reason)`` of the clips that could not be read so far; they are left out.
    """

    model: Any
    dataset: Any
    device: torch.device
    output: Path
    args: argparse.Namespace
    failed: list


class Clips(NamedTuple):
    """A batch as the model sees it."""

    fbank: torch.Tensor  # float32 [B, frames, 128], normalised, on the model's device
    sounding: torch.Tensor  # int64 [B]: frames that hold sound; what follows is padding
    targets: torch.Tensor  # float32 [B, K]
    index: torch.Tensor  # int64 [B]: numbers in the data set


def make_parser(script, description):
    """Parser of a script that analyses a checkpoint on a data set; the script adds options of its own."""
    parser = argparse.ArgumentParser(prog=f"python python/{script}.py", description=description)
    add_checkpoint_options(parser)
    add_data_options(parser)
    add_run_options(parser, script)
    run = parser.add_argument_group("clips")
    run.add_argument("--batch-size", type=int, default=32, metavar="B", help="clips at once (default: 32)")
    run.add_argument("--limit", type=int, metavar="N", help="only N clips, spread evenly over the data set")
    return parser


def add_run_options(parser, script):
    """The options that every script has."""
    run = parser.add_argument_group("run")
    run.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        default=Path("results", script),
        help=f"where the results go (default: results/{script})",
    )
    run.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")


def open_analysis(args):
    """Open what the options of ``make_parser`` name, as an `Analysis`; raises ``UserError`` before any long work."""
    check_least(args, batch_size=1, limit=1)
    matplotlib_figure()  # all results are drawn: say now if that cannot be
    device = distributed.start(args.device)
    model = open_checkpoint(args, args.dataset)
    dataset = open_dataset(args, model)
    return Analysis(model.to(device), dataset, device, make_folder(args.output), args, [])


def iterate_clips(analysis, text):
    """The data set as `Clips`, one batch in memory at a time, with a progress bar named ``text``.

    Clips that cannot be read are left out and added to ``analysis.failed``; raises ``UserError`` if none can.
    """
    from ..constants import HOP, WINDOW
    from ..data import FeatureExtractor, make_loader

    model, args = analysis.model, analysis.args
    features = FeatureExtractor(model.features).to(analysis.device)
    loader = make_loader(analysis.dataset, args.batch_size, train=False, workers=args.workers, limit=args.limit)
    failed, good = analysis.failed, 0
    for batch in tqdm(loader, desc=text, unit="batch", disable=None, leave=False):
        failed += batch.failed
        good += len(batch.index)
        if len(batch.index):
            with torch.inference_mode():
                fbank = features(batch.waves.to(analysis.device, non_blocking=True), batch.lengths)
            sounding = (1 + (batch.lengths - WINDOW) // HOP).clamp(0, model.frames)
            yield Clips(fbank, sounding, batch.targets, batch.index)
    if not good:
        reason = f"; the first, {failed[0][0]}: {failed[0][1]}" if failed else ""
        raise UserError(f"not one clip of {analysis.dataset.name} could be read{reason}")


def example_indices(analysis, count, match=()):
    """Numbers of the clips to show: ``count`` spread over the data set, or over those whose path contains a text.

    Of each stretch the first clip whose classes have not been shown yet, if there is one.

    Raises:
        UserError: no path contains any of the texts ``match``.
    """
    clips, args = analysis.dataset.clips, analysis.args
    order = [i for batch in eval_batches(len(clips), args.batch_size, limit=args.limit) for i in batch]
    if match:
        order = [i for i in order if any(text in str(clips[i].path) for text in match)]
        if not order:
            raise UserError(f"--match {' '.join(match)}: no clip of {analysis.dataset.name} has that in its path")
    count, shown, seen = min(count, len(order)), [], set()
    for i in range(count):
        stretch = order[i * len(order) // count : (i + 1) * len(order) // count]
        shown.append(next((clip for clip in stretch if seen.isdisjoint(clips[clip].labels)), stretch[0]))
        seen.update(clips[shown[-1]].labels)
    return shown


def save_result(output, name, rows, figure):
    """Write ``name.csv`` from a list of dicts and ``name.png`` and ``name.pdf`` from a figure, and say so."""
    write_csv(output / f"{name}.csv", rows)
    for suffix in ("png", "pdf"):
        save_figure(figure, output / f"{name}.{suffix}")
    print(f"Saved {output / name}.csv, .png and .pdf")


def report_failed(analysis):
    """Say which clips were left out, if any, and list them all in ``failed_clips.txt``."""
    path = save_failed(analysis.output, analysis.failed)
    say_failed(analysis.failed, len(analysis.dataset), path)


def describe_data(analysis):
    """The data in a few words for a figure's title: data set, split, clips."""
    args = analysis.args
    clips = min(len(analysis.dataset), args.limit or len(analysis.dataset)) - len(analysis.failed)
    fold = f", fold {args.fold}" if args.dataset == "esc50" else ""
    name = Path(args.manifest).stem if args.manifest else args.dataset
    return f"{name}, {args.split}{fold}, {clips} clips"
