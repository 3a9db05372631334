"""Options and error handling that the commands share.

Each option that several commands have is declared here once. This module imports torch only inside functions, so that
``pruneattn --help`` answers quickly.
"""

from __future__ import annotations

import argparse
import io
import os
import select
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from .data.clips import ClipDataset
    from .models.vit import PrunedViT

#: A parser or a group of one: anything that options can be added to.
Options = argparse._ActionsContainer

_LABEL_CSV_COLUMNS = "(index,mid,display_name)"
_KEEP_RATE = "--keep-rate"


class CommandParser(argparse.ArgumentParser):
    """Parser of a command. ``--keep-rate`` takes all numbers that follow, but no positional argument.

    With ``nargs="+"`` the option would take the checkpoint, too: ``--keep-rate 0.7 CHECKPOINT``.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse like argparse, with the numbers after ``--keep-rate`` joined into one value."""
        return super().parse_known_args(_join_keep_rates(sys.argv[1:] if args is None else args), namespace)


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run the entry point of a command and exit with the code that it returns.

    A ``UserError``, an operating system error and a lost loader worker each become one line and exit code 1. Ctrl-C
    becomes one line and exit code 130.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # like stderr: a file name may not be valid text
    try:
        code = main()
        sys.stdout.flush()  # here, so that a closed pipe is handled below and not at interpreter exit
        sys.exit(code)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            sys.exit(128 + signal.SIGPIPE)
        # A full disk, a read-only folder or a missing permission. The errno text and the path say which.
        where = f": {error.filename}" if error.filename else ""
        sys.exit(f"error: {error.strerror or error}{where}")
    except RuntimeError as error:
        # torch's signal handler raises this anywhere in the main process, also in code that does not read the loader.
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        sys.exit(
            f"error: {str(error).splitlines()[0].rstrip('. ')}: a process that decodes clips died, usually because "
            "memory or /dev/shm is full: use fewer --workers (train resumes from its last checkpoint with --resume)"
        )


def _output_is_closed() -> bool:
    """Whether the reader of standard output has closed it, as ``head`` does; then discard the rest of the output."""
    try:
        output = sys.stdout.fileno()
    except OSError:  # replaced by an object that is not a file
        return False
    poll = select.poll()
    poll.register(output, 0)
    closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)  # for the flush at interpreter exit
    return closed


def check_least(args: argparse.Namespace, **least: float) -> None:
    """Raise a ``UserError`` if a parsed option is below its least value. Options that were not given (None) pass."""
    for name, value in least.items():
        given = getattr(args, name)
        if given is not None and given < value:
            raise UserError(f"--{name.replace('_', '-')} {given}: must be at least {value}")


def add_checkpoint_options(parser: Options) -> None:
    """Add the options that ``open_checkpoint`` reads."""
    from .models.scores import SCORES

    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="training run folder, best.safetensors file, Hugging Face AST folder, or Hub repository (user/name or "
        "user/name@revision); with --model, any supported checkpoint file",
    )
    add_stride_option(parser, "the checkpoint's own; its positions are resampled for any other")
    group = parser.add_argument_group("checkpoints of other projects (AST, AudioMAE, Hugging Face, timm)")
    add_model_option(group, "model that the weights are for: audiomae_base, ast_base, ...")
    group.add_argument("--num-classes", type=int, metavar="K", help="classes of the head (default: the dataset's)")
    add_frames_option(group, "10 ms frames of the input (default: the dataset's)")
    group.add_argument(
        "--mean",
        type=float,
        help="mean of the log-mel values in training (default: the dataset's); also for Hugging Face folders without "
        "preprocessor_config.json",
    )
    group.add_argument("--std", type=float, help="standard deviation of these values, like --mean")
    group.add_argument(
        "--padding",
        choices=("zero", "min"),
        help="padding of short clips: zero (AST, AudioMAE, Hugging Face) or min, the spectrogram's minimum (this "
        "package) (default: zero)",
    )
    parser.add_argument("--score", choices=SCORES, help="score that ranks the patches (default: the checkpoint's)")


def open_checkpoint(args: argparse.Namespace, dataset: str) -> PrunedViT:
    """Open the checkpoint that the options of ``add_checkpoint_options`` name.

    Args:
        args: parsed options.
        dataset: name of the dataset that the checkpoint was trained for.
    """
    from .checkpoints import opening

    names = ("model", "stride", "num_classes", "frames", "mean", "std", "padding", "score")
    return opening.open_checkpoint(args.checkpoint, dataset=dataset, **{name: getattr(args, name) for name in names})


def add_data_options(parser: Options, split: str = "test") -> None:
    """Add the options that ``open_dataset`` reads, in a separate group.

    Args:
        parser: parser of the command.
        split: default of ``--split``.
    """
    from .data.catalog import DATASETS, SPLITS

    data = parser.add_argument_group("data")
    add_dataset_option(data, f"name of the dataset: {', '.join(DATASETS)}", required=True)
    data.add_argument("--split", default=split, choices=SPLITS, help=f"split of the dataset (default: {split})")
    add_source_options(data)


def add_source_options(data: Options) -> None:
    """Add the options that ``open_dataset`` reads to find the clips, and ``--workers``."""
    add_data_dir_option(data, "folder of the data (default: the variable PRUNEATTN_DATA)")
    data.add_argument("--fold", type=int, default=1, help="esc50: the held-out fold (default: 1)")
    data.add_argument("--manifest", metavar="JSON", help="manifest, as20k: JSON file of the clips, in AST's format")
    add_label_csv_option(data, "manifest, as20k: CSV of the labels")
    add_workers_option(data)


def open_dataset(args: argparse.Namespace, model: PrunedViT, split: str | None = None) -> ClipDataset:
    """Open the dataset that the options of ``add_data_options`` name; its classes must be those of the model.

    ``split`` overrides ``--split``.
    """
    from .checkpoints import opening

    names = ("data_dir", "fold", "manifest", "label_csv")
    options = {name: getattr(args, name) for name in names}
    return opening.open_dataset(model, args.checkpoint, args.dataset, split or args.split, **options)


_CALIBRATE = (
    "8-bit weights: clips of the training split on which the error of each layer is measured, to choose those that "
    "stay in floating point (default: 0, by the error of the weights)"
)


def add_calibrate_option(parser: Options, text: str = _CALIBRATE) -> None:
    """Add ``--calibrate`` for ``calibration_batches``."""
    parser.add_argument("--calibrate", type=int, default=0, metavar="N", help=text)


def calibration_batches(args: argparse.Namespace, model: PrunedViT) -> list[Tensor] | None:
    """Spectrograms ``[B, frames, 128]`` of the clips of ``--calibrate``, on the CPU; None if it is 0."""
    from .data import FeatureExtractor, make_loader

    if not args.calibrate:
        return None
    dataset = open_dataset(args, model, "train")
    loader = make_loader(dataset, args.batch_size, train=False, workers=args.workers, limit=args.calibrate)
    features = FeatureExtractor(model.features)
    return [features(batch.waves, batch.lengths) for batch in loader if len(batch.index)]


def add_trained_for_option(parser: Options) -> None:
    """Add ``--dataset`` for commands that read no dataset: ``open_checkpoint`` takes its defaults from it."""
    text = "with --model: dataset that the checkpoint was trained for (default: as20k)"
    add_dataset_option(parser, text, default="as20k")


def add_dataset_option(parser: Options, text: str, **settings: Any) -> None:
    """Add ``--dataset`` with a help text."""
    parser.add_argument("--dataset", metavar="NAME", help=text, **settings)


def add_data_dir_option(parser: Options, text: str, default: str | None = None) -> None:
    """Add ``--data-dir`` with a help text."""
    parser.add_argument("--data-dir", metavar="DIR", default=default, help=text)


def add_label_csv_option(parser: Options, what: str = "CSV of the labels") -> None:
    """Add ``--label-csv``; its help text is ``what`` and the columns of the file."""
    parser.add_argument("--label-csv", metavar="CSV", help=f"{what} {_LABEL_CSV_COLUMNS}")


def add_model_option(parser: Options, text: str, **settings: Any) -> None:
    """Add ``--model`` with a help text."""
    parser.add_argument("--model", metavar="NAME", help=text, **settings)


def add_frames_option(parser: Options, text: str, **settings: Any) -> None:
    """Add ``--frames`` with a help text."""
    parser.add_argument("--frames", type=int, metavar="F", help=text, **settings)


def add_stride_option(parser: Options, default: str) -> None:
    """Add ``--stride``, parsed as ``(frequency, time)``, or None if it is not given; the help describes ``default``."""
    from .models.patches import STRIDE_HELP, parse_stride

    parser.add_argument("--stride", type=parse_stride, metavar="S", help=f"{STRIDE_HELP} (default: {default})")


def add_keep_rate_option(
    parser: Options,
    text: str = "fraction of the patches that each pruning block keeps, in (0, 1]: one number, or one for each pruning "
    "block as 0.9 0.7 0.5 or 0.9,0.7,0.5 (default: the checkpoint's)",
) -> None:
    """Add ``--keep-rate``: the keep-rate that the model runs at. The parser must be a ``CommandParser``.

    The parsed value is None, a number, a tuple of numbers (given as one word, ``0.9,0.7,0.5``) or a list of numbers
    (given as several words, ``0.9 0.7 0.5``). ``model.set_keep_rate`` accepts all of these except None.
    """
    parser.add_argument(_KEEP_RATE, type=_parse_joined, metavar="R", help=text)


def add_keep_rates_option(parser: Options, default: Sequence[float], per_block: bool = False) -> None:
    """Add ``--keep-rates``: a sweep.

    Args:
        parser: parser or group.
        default: keep-rates of the sweep if none are given.
        per_block: accept ``0.9,0.7,0.5``, one number for each pruning block, as a keep-rate of the sweep: a tuple.
    """
    each = ", or one for each pruning block as 0.9,0.7,0.5" if per_block else ""
    parser.add_argument(
        "--keep-rates",
        type=parse_keep_rate if per_block else float,
        nargs="+",
        default=default,
        metavar="R",
        help=f"keep-rates to compare: fractions of the patches that each pruning block keeps, in (0, 1]{each} "
        f"(default: {' '.join(f'{rate:g}' for rate in default)})",
    )


def parse_keep_rate(text: str) -> float | tuple[float, ...]:
    """Read ``"0.7"`` as a number and ``"0.9,0.7,0.5"`` as a tuple of numbers."""
    try:
        rates = tuple(float(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor numbers joined by commas") from None
    return rates if len(rates) > 1 else rates[0]


def _parse_joined(text: str) -> float | tuple[float, ...] | list[float]:
    """Read a value of ``_join_keep_rates``; several words become a list of numbers."""
    words = text.split()
    return [float(word) for word in words] if len(words) > 1 else parse_keep_rate(text)


def _join_keep_rates(words: Iterable[str]) -> list[str]:
    """Join the numbers after ``--keep-rate`` into one word, ``"0.9 0.7 0.5"``."""
    joined: list[str] = []
    for word in words:
        if len(joined) > 1 and joined[-2] == _KEEP_RATE and _is_rate(word):
            joined[-1] += f" {word}"
        else:
            joined.append(word)
    return joined


def _is_rate(word: str) -> bool:
    try:
        return 0 <= float(word) <= 1
    except ValueError:
        return False


def add_output_option(parser: Options, metavar: str, text: str, **settings: Any) -> None:
    """Add ``--output``, a ``Path``, with a help text."""
    parser.add_argument("--output", type=Path, metavar=metavar, help=text, **settings)


def add_format_option(parser: Options, choices: Iterable[str], text: str) -> None:
    """Add ``--format``, which is required, with its choices and a help text."""
    parser.add_argument("--format", required=True, choices=tuple(choices), help=text)


def add_device_option(parser: Options, text: str = "device to run on") -> None:
    """Add ``--device`` for ``runtime.distributed.start``."""
    parser.add_argument("--device", default="auto", help=f"{text}: auto, cpu, cuda or cuda:N (default: auto)")


def add_batch_size_option(parser: Options, default: int, what: str = "clips") -> None:
    """Add ``--batch-size`` of inference: the number of ``what`` in a batch."""
    parser.add_argument(
        "--batch-size", type=int, default=default, metavar="B", help=f"{what} in a batch (default: {default})"
    )


def add_amp_option(parser: Options) -> None:
    """Add ``--amp``: the precision of inference."""
    from .runtime.inference import AMP_DTYPES, INT8

    parser.add_argument(
        "--amp",
        choices=(*AMP_DTYPES, INT8),
        default="fp32",
        help="precision; int8: 8-bit weights, on a CPU only (default: fp32)",
    )


def add_workers_option(parser: Options) -> None:
    """Add ``--workers``: the processes that decode clips."""
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes that decode clips (default: 0, decode in the main process)",
    )


def add_speed_options(parser: Options, batch_size: int) -> None:
    """Add the options of ``runtime.timing.measure_speed``.

    Args:
        parser: parser or group.
        batch_size: default of ``--batch-size``.
    """
    add_batch_size_option(parser, batch_size)
    add_amp_option(parser)
    parser.add_argument("--rounds", type=int, default=9, help="rounds of timing, 0 for no timing (default: 9)")
    parser.add_argument("--compile", action="store_true", help="also measure the speed with torch.compile")
