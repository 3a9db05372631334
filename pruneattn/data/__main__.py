"""``pruneattn data list | fetch | stats``: commands for datasets."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..cli import add_data_options, add_frames_option, check_least, run_command
from .catalog import DATASETS, load_dataset
from .fetch import fetch
from .stats import dataset_stats


def main(argv: Sequence[str] | None = None) -> int:
    """List, download or measure datasets with these command-line arguments, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="pruneattn data", description="List datasets, download them and compute their statistics."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    commands.add_parser("list", help="the datasets, the files that each dataset expects, and their sources")

    get = commands.add_parser("fetch", help="download of a free dataset; running it again resumes the download")
    get.add_argument("name", choices=("spc2", "esc50"), help="name of the dataset")
    get.add_argument("folder", metavar="DIR", help="folder for datasets: the files go to DIR/NAME")

    stats = commands.add_parser("stats", help="mean and standard deviation of a dataset's log-mel filterbank")
    add_data_options(stats, split="train")
    add_frames_option(stats, "number of frames to use from the start of each clip (default: the dataset's)")

    args = parser.parse_args(argv)
    {"list": _list, "fetch": _fetch, "stats": _stats}[args.command](args)
    return 0


def _list(args: argparse.Namespace) -> None:
    for name, info in DATASETS.items():
        classes = f"{info.num_classes} classes" if info.num_classes else "any classes"
        print(f"{name}: {classes}, {info.frames} frames of 10 ms, {info.splits}")
        for line in info.layout.splitlines():
            print(f"    {line}")
        print(f"    get it: {info.how_to_get}\n")


def _fetch(args: argparse.Namespace) -> None:
    target = fetch(args.name, args.folder)
    print(f"{args.name} is complete in {target}; use it with --data-dir {args.folder} or PRUNEATTN_DATA={args.folder}")


def _stats(args: argparse.Namespace) -> None:
    check_least(args, frames=1, workers=0)
    dataset = load_dataset(
        args.dataset,
        args.split,
        data_dir=args.data_dir,
        fold=args.fold,
        manifest=args.manifest,
        label_csv=args.label_csv,
        frames=args.frames,
    )
    stats = dataset_stats(dataset, workers=args.workers)
    for index, message in stats.failed:
        print(f"left out {dataset.clips[index].path}: {message}")
    print(f"{args.dataset} {args.split}, {stats.clips} clips: mean {stats.mean:.6f}, std {stats.std:.6f}")


if __name__ == "__main__":
    run_command(main)
