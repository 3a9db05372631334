"""What the commands open: a checkpoint (ours, which know all about themselves, or other people's), a data set."""

import hashlib
import json
import tempfile

import torch

from .errors import UserError
from .models.scores import SCORES


def add_checkpoint_options(parser):
    """The options by which ``open_checkpoint`` finds out what a checkpoint does not say itself."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT",
        help="a run folder of train, its best.safetensors, a folder of Hugging Face's AST, either's name on the Hub "
        "(user/name or user/name@revision), or with --model any other file",
    )  # fmt: skip
    group = parser.add_argument_group("checkpoints of other projects (AST, AudioMAE, Hugging Face, timm)")
    group.add_argument("--model", metavar="NAME", help="model that the weights are for: audiomae_base, ast_base, ...")
    group.add_argument("--num-classes", type=int, metavar="K", help="classes of its head (the dataset's)")
    group.add_argument("--frames", type=int, metavar="F", help="10 ms frames of its input (the dataset's)")
    group.add_argument("--mean", type=float, help="mean of the log-mel values it was trained with (the dataset's)")
    group.add_argument("--std", type=float, help="their standard deviation (the dataset's)")
    group.add_argument(
        "--padding", choices=("zero", "min"), default="zero",
        help="what follows a short clip: 0 (AST, AudioMAE, Hugging Face) or the spectrogram's floor (the paper's own) "
        "(default: zero)",
    )  # fmt: skip
    parser.add_argument("--score", choices=SCORES, help="what ranks the patches (the checkpoint's)")


def add_trained_for_option(parser):
    """``--dataset``, for commands that read none: it says what ``open_checkpoint`` takes from one."""
    parser.add_argument(
        "--dataset", default="as20k", help="with --model: dataset that the checkpoint was trained for (default: as20k)"
    )


def add_keep_rate_option(parser):
    """``--keep-rate``, one for all pruning blocks; ``set_keep_rate`` of the model if it is not None."""
    parser.add_argument(
        "--keep-rate", type=float, metavar="R",
        help="share of patches kept at each pruning block, in (0, 1] (the checkpoint's)",
    )  # fmt: skip


def open_checkpoint(args, dataset):
    """The model that the options of ``add_checkpoint_options`` describe, in eval mode on the CPU.

    Args:
        args: parsed options.
        dataset: name of the dataset whose number of classes, frames and statistics a foreign checkpoint has where
            options do not say otherwise.

    Returns:
        A ``PrunedViT`` with ``features`` (``FeatureConfig``), ``labels`` (list of names; None where unknown) and
        ``multilabel``.
    """
    if args.model is None:
        from .models.pretrained import load_pretrained

        for option in ("num_classes", "frames", "mean", "std"):
            if getattr(args, option) is not None:
                raise UserError(f"--{option.replace('_', '-')} is for checkpoints of other projects, with --model")
        model = load_pretrained(args.checkpoint)
    else:
        model = _open_foreign(args, dataset)
    if args.score is not None and args.score != model.score:
        model = reconfigured(model, score=args.score)
    return model.eval()


def class_names(model, label_csv):
    """Names of an opened checkpoint's classes: of a label CSV, else its own; None where it has none."""
    if label_csv is None:
        return model.labels
    from .data.manifest import read_label_csv

    _, names = read_label_csv(label_csv)
    if len(names) != model.num_classes:
        raise UserError(f"{label_csv} names {len(names)} classes, the checkpoint has {model.num_classes}")
    return names


def reconfigured(model, **changes):
    """An opened checkpoint's weights in a model of another ``score``, ``prune_blocks`` or ``keep_rate``, in eval mode."""
    from .models import create_model

    other = create_model(**{**model.config, **changes})
    other.load_state_dict(model.state_dict())
    for name in ("features", "labels", "multilabel"):
        setattr(other, name, getattr(model, name, None))
    return other.to(next(model.parameters()).device).eval()


def add_data_options(parser):
    """The options by which ``open_dataset`` finds the clips."""
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", required=True, help="as20k, spc2, esc50, voxceleb1, toy, manifest or folder")
    data.add_argument("--split", default="test", choices=("train", "val", "test"), help="(default: test)")
    data.add_argument("--data-dir", metavar="DIR", help="where the data is (else the variable PRUNEATTN_DATA)")
    data.add_argument("--fold", type=int, default=1, help="esc50: the fold that is held out (default: 1)")
    data.add_argument("--manifest", metavar="JSON", help="manifest: JSON file of the clips")
    data.add_argument("--label-csv", metavar="CSV", help="manifest: CSV of the labels (index,mid,display_name)")
    data.add_argument("--workers", type=int, default=0, help="processes that decode clips (default: 0, this one)")


def open_dataset(args, model):
    """The dataset of the options of ``add_data_options``, whose classes must be the model's."""
    from .data import load_dataset

    dataset = load_dataset(
        args.dataset, args.split, data_dir=args.data_dir, fold=args.fold, manifest=args.manifest,
        label_csv=args.label_csv, frames=model.frames,
    )  # fmt: skip
    where = f"{args.checkpoint} and the dataset {args.dataset} do not go together:"
    if model.num_classes != dataset.num_classes:
        raise UserError(f"{where} the checkpoint has {model.num_classes} classes, the dataset {dataset.num_classes}")
    if model.labels is None:
        model.labels, model.multilabel = dataset.labels, dataset.multilabel
    for number, (ours, theirs) in enumerate(zip(model.labels, dataset.labels)):
        if ours != theirs:
            raise UserError(f"{where} class {number} is {ours!r} in the checkpoint and {theirs!r} in the dataset")
    return dataset


def make_folder(path):
    """A folder for results, made and seen to be writable before the long work."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"cannot write into {path}: {error.strerror}; choose another folder with --output") from error
    return path


def describe(model):
    """A model in a few words: name, input and head."""
    return f"{model.name}, {model.frames} frames ({model.num_patches} patches), {model.num_classes} classes"


def fingerprint(model):
    """SHA-256 of all of an opened checkpoint that decides over its labels, but for the keep-rate."""
    config = {name: value for name, value in model.config.items() if name != "keep_rate"}
    known = [config, model.features.to_dict(), model.labels, model.multilabel]
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _open_foreign(args, dataset):
    from .data import FeatureConfig
    from .data.catalog import dataset_info
    from .models import create_model
    from .models.checkpoints import load_complete

    info = dataset_info(dataset)
    num_classes = info.num_classes if args.num_classes is None else args.num_classes
    if num_classes is None:
        raise UserError(f"the dataset {dataset} does not fix the number of classes: give --num-classes")
    frames = info.frames if args.frames is None else args.frames
    model = create_model(args.model, num_classes=num_classes, frames=frames)
    load_complete(model, args.checkpoint)
    model.features = FeatureConfig(
        frames=model.frames,
        mean=info.mean if args.mean is None else args.mean,
        std=info.std if args.std is None else args.std,
        padding=args.padding,
    )
    model.labels, model.multilabel = None, bool(info.multilabel)
    return model
