"""``python -m pruneattn.export``: a checkpoint as one file for ONNX Runtime, or for PyTorch without this package."""

import argparse
from pathlib import Path

import torch

from .checkpoints.opening import describe
from .cli import add_checkpoint_options, add_keep_rate_option, add_trained_for_option, open_checkpoint, run_command
from .models.export import FORMATS, export_model
from .runtime import distributed
from .runtime.inference import AMP_DTYPES


def main(argv=None):
    """Export as the command line says; returns the exit code."""
    args = _parse(argv)
    device = distributed.start("cpu" if args.format == "onnx" else args.device)
    model = open_checkpoint(args, args.dataset).to(device)
    if args.keep_rate is not None:
        model.set_keep_rate(args.keep_rate)
    path = args.output or Path(model.name + FORMATS[args.format])
    difference = export_model(
        model,
        path,
        args.format,
        waveform=args.waveform,
        dtype=AMP_DTYPES[args.dtype] or torch.float32,
        kernels=args.kernels,
    )
    rates = ", ".join(f"{rate:g}" for rate in dict.fromkeys(model.keep_rates))
    print(f"{path}: {describe(model)}, keep-rate {rates}, {path.stat().st_size / 2**20:.1f} MiB")
    where = "onnxruntime" if args.format == "onnx" else "a process of its own"
    print(f"checked in {where}: logits within {difference:.1e} of the model's")
    return 0


def _parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m pruneattn.export",
        description="Write a checkpoint for inference elsewhere, pruning inside, for any number of clips a call.",
    )
    add_checkpoint_options(parser)
    parser.add_argument(
        "--format",
        choices=tuple(FORMATS),
        required=True,
        help="onnx, torch (a program of torch.export) or aoti (compiled by AOTInductor for this kind of machine)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="(default: the model's name, in this folder)")
    add_keep_rate_option(parser)
    parser.add_argument(
        "--waveform",
        action="store_true",
        help="take samples at 16 kHz and their count in place of log-mels: the filterbank goes into the file too",
    )
    parser.add_argument("--dtype", choices=tuple(AMP_DTYPES), default="fp32", help="precision (default: fp32)")
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="torch, aoti: call pruneattn's kernels; whoever runs the file needs 'import pruneattn.ops'",
    )
    add_trained_for_option(parser)
    parser.add_argument("--device", default="auto", help="that it will run on: auto, cpu, cuda (default: auto)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
