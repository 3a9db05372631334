"""``pruneattn evaluate``: accuracy, multiply-accumulates and speed of a checkpoint at several keep-rates."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from .checkpoints.opening import describe
from .cli import (
    CommandParser,
    add_calibrate_option,
    add_checkpoint_options,
    add_data_options,
    add_device_option,
    add_keep_rate_option,
    add_keep_rates_option,
    add_output_option,
    add_speed_options,
    calibration_batches,
    check_least,
    open_checkpoint,
    open_dataset,
    run_command,
)
from .errors import UserError
from .files import make_folder
from .metrics import Metrics, evaluate_predictions
from .models.macs import Macs, count_macs
from .plot import KeepRate
from .report import FAILED, Row, save_table, say_failed, table_text
from .runtime import distributed
from .runtime.inference import INT8, optimized, predict_dataset
from .runtime.timing import describe_device, measure_speed

if TYPE_CHECKING:
    from .data.clips import ClipDataset
    from .models.vit import PrunedViT

KEEP_RATES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate a checkpoint with these command-line arguments, and return the exit code."""
    args = _parse(argv)
    device = distributed.start(args.device)
    try:
        model = open_checkpoint(args, args.dataset)
        keep_rates = sweep(args.keep_rate, args.keep_rates, len(model.prune_blocks))
        macs = [count_macs(model, keep_rate) for keep_rate in keep_rates]  # rejects invalid rates before any work
        dataset = open_dataset(args, model)
        output = _make_output(args) if distributed.is_main() else None
        if args.amp == INT8:
            model, _ = optimized(model, device, INT8, calibration_batches(args, model))
        scores, failed = score_keep_rates(
            model, dataset, keep_rates, device, amp=args.amp, batch_size=args.batch_size, workers=args.workers
        )
        if output is None:
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
            "quantization": None if model.quantization is None else str(model.quantization),
            "batch_size": args.batch_size,
            "device": describe_device(device),
            "torch": torch.__version__,
        }
        dense = count_macs(model, 1.0)
        rows = [_row(*columns, dense, context["metric"]) for columns in zip(keep_rates, scores, macs, strict=True)]
        unread = [*failed, *((str(path), "listed, but the file does not exist") for path in dataset.missing)]
        save = partial(save_table, output, rows, context, dataset.labels, [one["per_class"] for one in scores], unread)
        save()  # before the timing, which may take longer than all previous work, and may fail
        try:
            if args.rounds:
                _add_speed(rows, context, model if model.optimized else model.to(device), keep_rates, device, args)
                save()
        finally:
            print(table_text(rows, context))
            if model.quantization is not None:
                print(model.quantization)
            say_failed(failed, len(dataset), output / FAILED)
            print(f"\nSaved in {output}")
        return 0
    finally:
        distributed.finish()


def sweep(keep_rate: KeepRate | None, keep_rates: Sequence[KeepRate], blocks: int) -> list[KeepRate]:
    """The keep-rates to evaluate at, each once. A rate that all blocks share becomes a number.

    ``--keep-rate`` with several words was a sweep before ``--keep-rates`` existed. It still is one, with a warning,
    where the words cannot be one rate for each pruning block.

    Args:
        keep_rate: parsed ``--keep-rate``; a list of numbers if it was several words.
        keep_rates: parsed ``--keep-rates``.
        blocks: number of the model's pruning blocks.

    Raises:
        UserError: ``--keep-rate`` has as many words as there are pruning blocks, and so two meanings.
    """
    if isinstance(keep_rate, list):
        words = [f"{rate:g}" for rate in keep_rate]
        instead = f"--keep-rates {' '.join(words)}"
        if len(keep_rate) == blocks and len(set(keep_rate)) > 1:
            raise UserError(
                f"--keep-rate {' '.join(words)} is ambiguous: use {instead} to compare these keep-rates, or "
                f"--keep-rate {','.join(words)} to evaluate with one for each of the {blocks} pruning blocks"
            )
        if distributed.is_main():
            print(f"warning: --keep-rate with several values is deprecated: use {instead}", file=sys.stderr)
        keep_rates = keep_rate
    elif keep_rate is not None:
        keep_rates = [keep_rate]
    return list(dict.fromkeys(_shared(rate, blocks) for rate in keep_rates))


def _shared(keep_rate: KeepRate, blocks: int) -> KeepRate:
    """A keep-rate as a number if it gives each of the blocks the same number."""
    if isinstance(keep_rate, tuple) and len(keep_rate) == blocks and len(set(keep_rate)) == 1:
        return keep_rate[0]
    return keep_rate


def score_keep_rates(
    model: PrunedViT,
    dataset: ClipDataset,
    keep_rates: Sequence[KeepRate],
    device: torch.device,
    *,
    amp: str = "fp32",
    batch_size: int = 32,
    workers: int = 0,
) -> tuple[list[Metrics], list[tuple[str, str]]]:
    """Compute the metrics of a dataset at several keep-rates in one pass over its clips.

    Args:
        model: opened checkpoint. It is not changed.
        dataset: dataset with the classes of the model.
        keep_rates: numbers, or tuples of one number for each pruning block.
        device: device to run on.
        amp: "fp32", "bf16", "fp16" or "int8".
        batch_size: clips in a batch.
        workers: processes that decode clips.

    Returns:
        The results of ``evaluate_predictions`` in the order of ``keep_rates``, and ``(path, reason)`` of each clip that
        could not be read. Every process gets the same values.

    Raises:
        UserError: the model has no features, or no clip could be read.
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
        evaluate_predictions(predictions.logits[:, i], predictions.targets, bool(model.multilabel))
        for i in range(len(keep_rates))
    ]
    return scores, predictions.failed


class _AtKeepRates(nn.Module):
    """A model at several keep-rates: ``[B, rates, K]`` logits, so that each clip is decoded once for all of them."""

    def __init__(self, model: PrunedViT, keep_rates: Sequence[KeepRate]) -> None:
        super().__init__()
        self.model, self.keep_rates = model, keep_rates

    def forward(self, fbank: torch.Tensor) -> torch.Tensor:
        logits = []
        for keep_rate in self.keep_rates:
            self.model.set_keep_rate(keep_rate)
            logits.append(self.model(fbank))
        return torch.stack(logits, dim=1)


def _row(keep_rate: KeepRate, score: Metrics, macs: Macs, dense: Macs, metric: str) -> Row:
    return {
        "keep_rate": keep_rate,
        "metric": score[metric],
        **{name: score[name] for name in ("map", "mauc", "dprime", "top1", "top5")},
        "gmacs_paper": macs.paper / 1e9,
        "gmacs_computed": macs.computed / 1e9,
        "theory": 1 - macs.paper / dense.paper,
    }


def _add_speed(
    rows: list[Row],
    context: dict[str, Any],
    model: PrunedViT,
    keep_rates: Sequence[KeepRate],
    device: torch.device,
    args: argparse.Namespace,
) -> None:
    """Measure the speed, and add it to the rows and to the context."""
    speed = measure_speed(
        model, keep_rates, device, amp=args.amp, batch_size=args.batch_size, rounds=args.rounds, compiled=args.compile
    )
    context |= {"rounds": args.rounds, "dense": speed.dense, "dense_clips_per_second": speed.dense_clips_per_second}
    for row in rows:
        row |= speed.row(row["keep_rate"], theory=row["theory"])


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog="pruneattn evaluate",
        description="Measure accuracy, multiply-accumulates and speed of a checkpoint at several keep-rates. "
        "torchrun -m pruneattn.evaluate shares the clips between processes.",
    )
    add_checkpoint_options(parser)
    rates = parser.add_mutually_exclusive_group()
    add_keep_rate_option(
        rates,
        "the one keep-rate to evaluate at: one number, or one for each pruning block as 0.9,0.7,0.5 (several words, "
        "0.9 0.7 0.5, are a deprecated form of --keep-rates)",
    )
    add_keep_rates_option(rates, KEEP_RATES, per_block=True)
    add_data_options(parser)
    run = parser.add_argument_group("run")
    add_output_option(
        run,
        "DIR",
        "folder of the results (default: evaluation-DATASET-SPLIT next to the checkpoint, or in the current folder if "
        "the checkpoint is on the Hub)",
    )
    add_device_option(run)
    add_speed_options(run, batch_size=32)
    add_calibrate_option(run)
    args = parser.parse_args(argv)
    check_least(args, batch_size=1, rounds=0, workers=0, calibrate=0)
    if args.calibrate and args.amp != INT8:
        raise UserError(f"--calibrate {args.calibrate} applies only with --amp int8")
    return args


def _make_output(args: argparse.Namespace) -> Path:
    """The folder of the results, created and checked to be writable before the long work."""
    output = args.output
    if output is None:
        checkpoint = Path(args.checkpoint)
        fold = f"-fold{args.fold}" if args.dataset == "esc50" else ""
        parent = checkpoint.parent if checkpoint.is_file() else Path()  # the current folder for a name on the Hub
        folder = checkpoint if checkpoint.is_dir() else parent
        output = folder / f"evaluation-{args.dataset}-{args.split}{fold}"
    return make_folder(output)


def _metric(name: str, multilabel: bool | None) -> str:
    from .data import DATASETS

    return DATASETS[name].metric or ("map" if multilabel else "top1")


if __name__ == "__main__":
    run_command(main)
