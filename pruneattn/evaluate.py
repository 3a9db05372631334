"""``python -m pruneattn.evaluate``: what a checkpoint is worth, and what it costs, over the keep-rates."""

import argparse
import copy
from functools import partial
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from .checkpoints.opening import describe
from .cli import (
    add_checkpoint_options,
    add_data_options,
    add_speed_options,
    check_least,
    open_checkpoint,
    open_dataset,
    run_command,
)
from .files import make_folder
from .metrics import evaluate_predictions
from .models.macs import count_macs
from .report import FAILED, save_table, say_failed, table_text
from .runtime import distributed
from .runtime.inference import optimized, predict_dataset
from .runtime.timing import describe_device, measure_speed

KEEP_RATES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


def main(argv=None):
    """Evaluate as the command line says; returns the exit code."""
    args = _parse(argv)
    device = distributed.start(args.device)
    try:
        model = open_checkpoint(args, args.dataset)
        keep_rates = list(dict.fromkeys(args.keep_rate))
        for keep_rate in keep_rates:
            model.set_keep_rate(keep_rate)  # refuses what makes no sense, before any work
        dataset = open_dataset(args, model)
        output = _make_output(args) if distributed.is_main() else None
        scores, failed = score_keep_rates(
            model, dataset, keep_rates, device, amp=args.amp, batch_size=args.batch_size, workers=args.workers
        )
        if not distributed.is_main():
            return 0
        context = {
            "checkpoint": str(args.checkpoint),
            "model": describe(model),
            "score": model.score,
            "dataset": args.dataset,
            "split": args.split,
            "fold": args.fold if args.dataset == "esc50" else None,
            "clips": len(dataset) - len(failed),
            "failed": len(failed),
            "missing": len(dataset.missing),
            "metric": _metric(args.dataset, model.multilabel),
            "amp": args.amp,
            "batch_size": args.batch_size,
            "device": describe_device(device),
            "torch": torch.__version__,
        }
        rows = [_row(model, keep_rate, score, context["metric"]) for keep_rate, score in zip(keep_rates, scores)]
        unread = [*failed, *((str(path), "listed, but the file is not there") for path in dataset.missing)]
        save = partial(save_table, output, rows, context, dataset.labels, [one["per_class"] for one in scores], unread)
        save()  # whatever becomes of the timing, which can take longer than all before
        try:
            if args.rounds:
                _add_speed(rows, context, model.to(device), keep_rates, device, args)
                save()
        finally:
            print(table_text(rows, context))
            say_failed(failed, len(dataset), output / FAILED)
            print(f"\nSaved in {output}")
        return 0
    finally:
        distributed.finish()


def score_keep_rates(model, dataset, keep_rates, device, *, amp="fp32", batch_size=32, workers=0):
    """Metrics of a dataset at several keep-rates from one pass over its clips.

    Returns:
        The list of ``evaluate_predictions`` results in the order of ``keep_rates``, and the list of
        ``(path, reason)`` of the clips that could not be read. The same in every process.
    """
    from .data import FeatureExtractor, make_loader

    loader = make_loader(
        dataset, batch_size, train=False, workers=workers, rank=distributed.rank(), world=distributed.world_size()
    )
    # disable=None: no bar where stderr is no terminal.
    progress = tqdm(loader, desc="evaluate", unit="batch", disable=None if distributed.is_main() else True, leave=False)
    features = FeatureExtractor(model.features).to(device)
    model, amp = optimized(copy.deepcopy(model), device, amp)
    predictions = predict_dataset(_AtKeepRates(model, keep_rates), features, progress, device, amp)
    scores = [
        evaluate_predictions(predictions.logits[:, i], predictions.targets, model.multilabel)
        for i in range(len(keep_rates))
    ]
    return scores, predictions.failed


class _AtKeepRates(nn.Module):
    """A model at several keep-rates: ``[B, rates, K]`` logits, so that clips are decoded once for all of them."""

    def __init__(self, model, keep_rates):
        super().__init__()
        self.model, self.keep_rates = model, keep_rates

    def forward(self, fbank):
        logits = []
        for keep_rate in self.keep_rates:
            self.model.set_keep_rate(keep_rate)
            logits.append(self.model(fbank))
        return torch.stack(logits, dim=1)


def _row(model, keep_rate, score, metric):
    model.set_keep_rate(1.0)
    dense = count_macs(model).paper
    model.set_keep_rate(keep_rate)
    macs = count_macs(model)
    return {
        "keep_rate": keep_rate,
        "metric": score[metric],
        **{name: score[name] for name in ("map", "mauc", "dprime", "top1", "top5")},
        "gmacs_paper": macs.paper / 1e9,
        "gmacs_computed": macs.computed / 1e9,
        "theory": 1 - macs.paper / dense,
    }


def _add_speed(rows, context, model, keep_rates, device, args):
    """Measure the speed, and add it to the rows and to the context."""
    speed = measure_speed(
        model, keep_rates, device, amp=args.amp, batch_size=args.batch_size, rounds=args.rounds, compiled=args.compile
    )
    context |= {"rounds": args.rounds, "dense": speed.dense, "dense_clips_per_second": speed.dense_clips_per_second}
    for row in rows:
        row |= speed.row(row["keep_rate"], theory=row["theory"])


def _parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m pruneattn.evaluate",
        description="Accuracy, multiply-accumulates and measured speed of a checkpoint at several keep-rates. "
        "Start it with torchrun to share the clips between processes.",
    )
    add_checkpoint_options(parser)
    parser.add_argument(
        "--keep-rate",
        type=float,
        nargs="+",
        default=KEEP_RATES,
        metavar="R",
        help=f"shares of patches kept at each pruning block, in (0, 1] (default: {' '.join(map(str, KEEP_RATES))})",
    )
    add_data_options(parser)
    run = parser.add_argument_group("run")
    run.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where the results go (default: beside the checkpoint, or here if it is from the Hub)",
    )
    run.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add_speed_options(run, batch_size=32)
    args = parser.parse_args(argv)
    check_least(args, batch_size=1, rounds=0, workers=0)
    return args


def _make_output(args):
    """The folder for the results, made and seen to be writable before the long work."""
    output = args.output
    if output is None:
        checkpoint = Path(args.checkpoint)
        fold = f"-fold{args.fold}" if args.dataset == "esc50" else ""
        beside = checkpoint.parent if checkpoint.is_file() else Path()  # of the Hub's there is no folder to write to
        folder = checkpoint if checkpoint.is_dir() else beside
        output = folder / f"evaluation-{args.dataset}-{args.split}{fold}"
    return make_folder(output)


def _metric(name, multilabel):
    from .data import DATASETS

    return DATASETS[name].metric or ("map" if multilabel else "top1")


if __name__ == "__main__":
    run_command(main)
