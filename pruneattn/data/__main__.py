"""Commands for data: ``python -m pruneattn.data list | fetch | stats``."""

import argparse

from ..cli import check_least, run_command
from .catalog import DATASETS, SPLITS, load_dataset
from .fetch import fetch
from .stats import dataset_stats


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m pruneattn.data", description="Get data sets and look at them.")
    commands = parser.add_subparsers(dest="command", required=True)

    commands.add_parser("list", help="the data sets, the files each expects and how to get them")

    get = commands.add_parser("fetch", help="download a data set that is free; run again, it goes on where it stopped")
    get.add_argument("name", choices=("spc2", "esc50"))
    get.add_argument("folder", metavar="DIR", help="folder for data sets: the files go to DIR/NAME")

    stats = commands.add_parser("stats", help="mean and standard deviation of a data set's log-mel filterbank")
    stats.add_argument("--dataset", required=True, choices=DATASETS)
    stats.add_argument("--data-dir", help="the data set's folder, or one that holds it (default: PRUNEATTN_DATA)")
    stats.add_argument("--split", choices=SPLITS, default="train")
    stats.add_argument("--fold", type=int, default=1, help="esc50: the fold to test on (default: 1)")
    stats.add_argument("--manifest", help="manifest, as20k: AST-style JSON file")
    stats.add_argument("--label-csv", help="manifest, as20k: CSV with index,mid,display_name")
    stats.add_argument("--frames", type=int, help="cut clips to this many frames (default: the data set's)")
    stats.add_argument("--workers", type=int, default=0, help="processes that decode (default: 0, this one)")

    args = parser.parse_args(argv)
    {"list": _list, "fetch": _fetch, "stats": _stats}[args.command](args)


def _list(args):
    for name, info in DATASETS.items():
        classes = f"{info.num_classes} classes" if info.num_classes else "any classes"
        print(f"{name}: {classes}, {info.frames} frames of 10 ms, {info.splits}")
        for line in info.layout.splitlines():
            print(f"    {line}")
        print(f"    get it: {info.how_to_get}\n")


def _fetch(args):
    target = fetch(args.name, args.folder)
    print(f"{args.name} is complete in {target}; use it with --data-dir {args.folder} or PRUNEATTN_DATA={args.folder}")


def _stats(args):
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
