"""``pruneattn export``: a checkpoint as one file for ONNX Runtime, or for PyTorch without this package."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from .checkpoints.opening import describe
from .cli import (
    CommandParser,
    add_calibrate_option,
    add_checkpoint_options,
    add_dataset_option,
    add_device_option,
    add_format_option,
    add_keep_rate_option,
    add_output_option,
    add_source_options,
    calibration_batches,
    check_least,
    open_checkpoint,
    run_command,
)
from .models.export import FORMATS, export_model
from .models.export_int8 import check_int8
from .plot import keep_rate_text
from .runtime import distributed
from .runtime.inference import AMP_DTYPES, INT8


def main(argv: Sequence[str] | None = None) -> int:
    """Export a checkpoint with these command-line arguments, and return the exit code."""
    args = _parse(argv)
    dtype = torch.int8 if args.dtype == INT8 else AMP_DTYPES[args.dtype] or torch.float32
    check_int8(dtype, args.format, args.waveform, args.calibrate > 0)  # before the clips are read
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
        dtype=dtype,
        kernels=args.kernels,
        calibrate=calibration_batches(args, model),
    )
    rates = keep_rate_text(model.keep_rates)
    print(f"{path}: {describe(model)}, keep-rate {rates}, {path.stat().st_size / 2**20:.1f} MiB")
    where = "onnxruntime" if args.format == "onnx" else "a new process"
    print(f"checked in {where}: logits within {difference:.1e} of the model's")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog="pruneattn export",
        description="Write a checkpoint as one file for inference elsewhere. The file contains the pruning and takes "
        "any number of clips per call.",
    )
    add_checkpoint_options(parser)
    add_format_option(
        parser,
        FORMATS,
        "format: onnx, torch (a program of torch.export) or aoti (compiled by AOTInductor for this kind of machine)",
    )
    add_output_option(parser, "FILE", "file to write (default: the model's name, in the current folder)")
    add_keep_rate_option(parser)
    parser.add_argument(
        "--waveform",
        action="store_true",
        help="take samples at 16 kHz and their number instead of log-mels: the file contains the filterbank, too",
    )
    parser.add_argument(
        "--dtype",
        choices=(*AMP_DTYPES, INT8),
        default="fp32",
        help="precision; int8: 8-bit linear layers, onnx only, needs --calibrate (default: fp32)",
    )
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="torch, aoti: call the kernels of pruneattn; the program that runs the file needs 'import pruneattn.ops'",
    )
    add_dataset_option(
        parser,
        "with --model: dataset that the checkpoint was trained for; with --calibrate: dataset of the clips (default: "
        "as20k)",
        default="as20k",
    )
    add_device_option(parser, "target device of the exported file")
    data = parser.add_argument_group("calibration data (--dtype int8)")
    add_calibrate_option(data, "clips of the training split that give the ranges of the activations, for example 64")
    add_source_options(data)
    parser.set_defaults(batch_size=8)  # of the calibration
    args = parser.parse_args(argv)
    check_least(args, calibrate=0, workers=0)
    return args


if __name__ == "__main__":
    run_command(main)
