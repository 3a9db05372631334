"""The options and the error handling that the commands share."""

import io
import signal
import sys

from .checkpoints import opening
from .errors import UserError
from .models.scores import SCORES
from .runtime.inference import AMP_DTYPES


def check_least(args, **least):
    """Raise a ``UserError`` if a parsed option is below its least value; one that was not given (None) is not."""
    for name, value in least.items():
        given = getattr(args, name)
        if given is not None and given < value:
            raise UserError(f"--{name.replace('_', '-')} {given}: must be at least {value}")


def run_command(main):
    """Run a command line entry point and leave with the exit code it returns.

    A ``UserError``, an operating system error or a lost loader worker becomes one line and exit code 1, Ctrl-C one line
    and 130.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as of stderr: a file name may be no text
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except OSError as error:
        # A full disk, a read-only folder, a missing permission: errno text and path say which.
        where = f": {error.filename}" if error.filename else ""
        sys.exit(f"error: {error.strerror or error}{where}")
    except RuntimeError as error:
        # From torch's signal handler, and so out of any line of the main process, whoever reads the loader.
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        sys.exit(
            f"error: {str(error).splitlines()[0].rstrip('. ')}: a process that decodes clips died, most often for want of "
            "memory or of room in /dev/shm: give fewer --workers (train goes on from its last checkpoint with --resume)"
        )


def add_checkpoint_options(parser):
    """The options by which ``open_checkpoint`` finds out what a checkpoint does not say itself."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a run folder of train, its best.safetensors, a folder of Hugging Face's AST, either's name on the Hub "
        "(user/name or user/name@revision), or with --model any other file",
    )
    group = parser.add_argument_group("checkpoints of other projects (AST, AudioMAE, Hugging Face, timm)")
    group.add_argument("--model", metavar="NAME", help="model that the weights are for: audiomae_base, ast_base, ...")
    group.add_argument("--num-classes", type=int, metavar="K", help="classes of its head (the dataset's)")
    group.add_argument("--frames", type=int, metavar="F", help="10 ms frames of its input (the dataset's)")
    group.add_argument("--mean", type=float, help="mean of the log-mel values it was trained with (the dataset's)")
    group.add_argument("--std", type=float, help="their standard deviation (the dataset's)")
    group.add_argument(
        "--padding",
        choices=("zero", "min"),
        default="zero",
        help="what follows a short clip: 0 (AST, AudioMAE, Hugging Face) or the spectrogram's floor (the paper's own) "
        "(default: zero)",
    )
    parser.add_argument("--score", choices=SCORES, help="what ranks the patches (the checkpoint's)")


def add_trained_for_option(parser):
    """``--dataset``, for commands that read none: it says what ``open_checkpoint`` takes from one."""
    parser.add_argument(
        "--dataset", default="as20k", help="with --model: dataset that the checkpoint was trained for (default: as20k)"
    )


def add_keep_rate_option(parser):
    """``--keep-rate``, one for all pruning blocks; ``set_keep_rate`` of the model if it is not None."""
    parser.add_argument(
        "--keep-rate",
        type=float,
        metavar="R",
        help="share of patches kept at each pruning block, in (0, 1] (the checkpoint's)",
    )


def add_keep_rates_option(parser, default):
    """``--keep-rates``, a sweep."""
    shown = " ".join(f"{rate:g}" for rate in default)
    parser.add_argument(
        "--keep-rates",
        type=float,
        nargs="+",
        default=default,
        metavar="R",
        help=f"shares of patches kept at each pruning block, in (0, 1] (default: {shown})",
    )


def add_device_option(parser):
    """``--device``, for ``runtime.distributed.start``."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")


def add_batch_size_option(parser, default, what="clips"):
    """``--batch-size`` of inference."""
    parser.add_argument(
        "--batch-size", type=int, default=default, metavar="B", help=f"{what} in a batch (default: {default})"
    )


def add_amp_option(parser):
    """``--amp``, the precision of inference."""
    parser.add_argument("--amp", choices=tuple(AMP_DTYPES), default="fp32", help="precision (default: fp32)")


def add_workers_option(parser):
    """``--workers``."""
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes that decode clips (default: 0, this one)"
    )


def add_label_csv_option(parser, what="CSV of the labels"):
    """``--label-csv``."""
    parser.add_argument("--label-csv", metavar="CSV", help=f"{what} (index,mid,display_name)")


def add_data_options(parser):
    """The options by which ``open_dataset`` finds the clips."""
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", required=True, help="as20k, spc2, esc50, voxceleb1, toy, manifest or folder")
    data.add_argument("--split", default="test", choices=("train", "val", "test"), help="(default: test)")
    data.add_argument("--data-dir", metavar="DIR", help="where the data is (else the variable PRUNEATTN_DATA)")
    data.add_argument("--fold", type=int, default=1, help="esc50: the fold that is held out (default: 1)")
    data.add_argument("--manifest", metavar="JSON", help="manifest: JSON file of the clips")
    add_label_csv_option(data, "manifest: CSV of the labels")
    add_workers_option(data)


def add_speed_options(parser, batch_size):
    """The options of ``measure_speed``."""
    add_batch_size_option(parser, batch_size)
    add_amp_option(parser)
    parser.add_argument("--rounds", type=int, default=9, help="rounds of timing; 0 leaves it out (default: 9)")
    parser.add_argument("--compile", action="store_true", help="measure the speed with torch.compile as well")


def open_checkpoint(args, dataset):
    """The model of the options of ``add_checkpoint_options``; ``dataset`` is the one that it was trained for."""
    names = ("model", "num_classes", "frames", "mean", "std", "padding", "score")
    return opening.open_checkpoint(args.checkpoint, dataset=dataset, **{name: getattr(args, name) for name in names})


def open_dataset(args, model):
    """The dataset of the options of ``add_data_options``, whose classes must be the model's."""
    names = ("data_dir", "fold", "manifest", "label_csv")
    options = {name: getattr(args, name) for name in names}
    return opening.open_dataset(model, args.checkpoint, args.dataset, args.split, **options)
