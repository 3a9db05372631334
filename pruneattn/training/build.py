"""Sets up a `Trainer`: data, model, optimizer, and the state from which a run resumes."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from ..checkpoints.load_checkpoint import load_weights
from ..checkpoints.weights import Weights, read_weights
from ..constants import PATCH, VERSION
from ..data import DATASETS, FeatureConfig, FeatureExtractor, load_dataset
from ..data.augment import Augment
from ..data.catalog import DatasetInfo
from ..data.clips import ClipDataset
from ..data.stats import dataset_stats
from ..errors import UserError
from ..files import write_json, write_lines
from ..models import create_model
from ..models.vit import PrunedViT
from ..runtime import distributed
from ..runtime.signals import StopRequest
from . import state
from .engine import Trainer
from .log import RunLog, say
from .optim import make_optimizer
from .options import Options, describe
from .recipes import RECIPES, Recipe
from .seed import seed_step


def open_splits(options: Options, recipe: Recipe) -> dict[str, ClipDataset | None]:
    """Open the datasets of the splits "train", "val" and "test", without decoding any clip.

    Only the dataset of "test" can be None, if ``--dataset manifest`` has no test manifest.
    """
    train_set = open_split(options, recipe, "train")
    assert train_set is not None  # open_split requires it
    # The training clips decide: in a small val split, each clip may happen to have one label.
    others = {split: open_split(options, recipe, split, train_set.multilabel) for split in ("val", "test")}
    return {"train": train_set, **others}


def open_split(options: Options, recipe: Recipe, split: str, multilabel: bool | None = None) -> ClipDataset | None:
    """Open the dataset of a split.

    Args:
        options: names the dataset and its files.
        recipe: limits the length of the clips by its ``frames``.
        split: "train", "val" or "test".
        multilabel: whether a clip can have several classes; None if the clips of the split decide.

    Returns:
        The dataset; None for the test split of ``--dataset manifest`` without a test manifest.
    """
    manifest = getattr(options, f"{split}_manifest")
    if options.dataset == "manifest" and manifest is None:
        if split == "test":
            return None
        raise UserError(f"--dataset manifest requires --{split}-manifest, a JSON file of clips")
    return load_dataset(
        options.dataset,
        split,
        data_dir=options.data_dir,
        fold=options.fold,
        manifest=manifest,
        label_csv=options.label_csv,
        multilabel=multilabel,
        frames=recipe.frames,
        seed=options.seed,
    )


def resolve(recipe: Recipe, info: DatasetInfo, dataset: ClipDataset) -> Recipe:
    """Fill in the values of a recipe that depend on the data."""
    mean, std = info.mean, info.std
    if dataset.name in ("manifest", "folder") and None in (recipe.mean, recipe.std):
        mean, std = measure(dataset)
    return dataclasses.replace(
        recipe,
        frames=recipe.frames or info.frames,
        mean=mean if recipe.mean is None else recipe.mean,
        std=std if recipe.std is None else recipe.std,
        loss=("bce" if dataset.multilabel else "ce") if recipe.loss == "auto" else recipe.loss,
        metric=("map" if dataset.multilabel else "top1") if recipe.metric == "auto" else recipe.metric,
    )


def measure(dataset: ClipDataset) -> tuple[float, float]:
    """Mean and standard deviation of the log-mel over at most 1000 clips of a dataset, rounded to 3 decimals."""
    count = min(len(dataset), 1000)
    clips = torch.utils.data.Subset(dataset, [i * len(dataset) // count for i in range(count)])
    stats = dataset_stats(clips, progress=False)
    say(f"measured on {stats.clips} training clips: --mean {stats.mean:.3f} --std {stats.std:.3f}")
    return round(stats.mean, 3), round(stats.std, 3)


def describe_data(train_set: ClipDataset, val_set: ClipDataset) -> dict[str, Any]:
    """Classes and digests of the clips, which must be the same when a run resumes.

    A digest covers file names and labels, but not folders, so that data can be moved.
    """

    def digest(dataset: ClipDataset) -> str:
        lines = "".join(f"{clip.path.name} {clip.labels}\n" for clip in dataset.clips)
        return hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()[:16]

    return {
        "train_clips": len(train_set),
        "num_classes": train_set.num_classes,
        "labels": train_set.labels,
        "train_clips_digest": digest(train_set),
        "val_clips_digest": digest(val_set),
    }


def build_model(options: Options, recipe: Recipe, num_classes: int) -> PrunedViT:
    """Create the model with random weights that depend only on the seed."""
    assert recipe.frames is not None and options.stride is not None  # resolved
    seed_step(options.seed, -1)
    return create_model(
        _model_name(options),
        num_classes=num_classes,
        frames=recipe.frames,
        stride=options.stride,
        score=recipe.score,
        prune_blocks=recipe.prune_blocks,
        drop_path=recipe.drop_path,
        embed_dim=options.embed_dim,
        depth=options.depth,
        num_heads=options.num_heads,
    )


def _model_name(options: Options) -> str:
    return f"{options.model}_{options.size}"


def resolve_stride(
    options: Options, saved: Mapping[str, Any] | None, of_weights: tuple[int, int] | None
) -> tuple[int, int]:
    """The stride of a run: of the run that continues, else as given, else of the initial weights, else 16.

    Args:
        options: the options, with or without a stride.
        saved: configuration of the run that resumes or branches. It has the stride of the options, if they have one.
        of_weights: stride of the checkpoint of ``--init``, if any.
    """
    if saved is not None:
        frequency, time = saved.get("stride", (PATCH, PATCH))  # versions before strides saved none
        return frequency, time
    return options.stride or of_weights or (PATCH, PATCH)


def initialize(options: Options, model: PrunedViT, weights: Weights | None, stride: tuple[int, int] | None) -> None:
    """Load the weights of ``--init``, whose positions have this stride.

    Without weights, print a note if the paper's recipe expects them.
    """
    if weights is not None:
        say(load_weights(model, weights, stride))
    elif (options.model, options.dataset) in RECIPES:
        say("note: the paper's recipe is for a pretrained model; without --init, training starts from random weights")


def check_batch(recipe: Recipe, train_set: ClipDataset) -> None:
    """Raise ``UserError`` if a batch cannot be split evenly, or if the clips do not fill one batch."""
    parts = distributed.world_size() * recipe.accumulate
    if recipe.batch_size % parts:
        raise UserError(
            f"--batch-size {recipe.batch_size} cannot be split evenly: {distributed.world_size()} processes times "
            f"--accumulate {recipe.accumulate} are {parts} parts"
        )
    if len(train_set) < recipe.batch_size:
        raise UserError(
            f"{len(train_set)} training clips do not fill one batch: use a --batch-size of at most {len(train_set)}"
        )


def build_trainer(options: Options, recipe: Recipe, stop: StopRequest, lock: ExitStack) -> Trainer:
    """Set up a run; if it resumes or branches from a checkpoint, in the state of the checkpoint.

    Args:
        options: model, data, device and output.
        recipe: settings of the training; values that depend on the data can be None.
        stop: records the signals that end the run.
        lock: holds the lock of the output folder, which two runs must not write at the same time.

    Raises:
        UserError: options, data, output folder or checkpoint are invalid or do not match.
    """
    device = distributed.start(options.device)
    if options.deterministic:
        torch.use_deterministic_algorithms(True)
    resume, folder = find_resume(options)
    splits = open_splits(options, recipe)
    train_set, val_set = splits["train"], splits["val"]
    assert train_set is not None and val_set is not None  # only the test split is optional
    check_batch(recipe, train_set)
    if distributed.is_main():
        state.open_output(folder, resuming=options.resume is not None, lock=lock)
    if options.cache:
        train_set.fill_cache()
        val_set.fill_cache()
    recipe = resolve(recipe, DATASETS[options.dataset], train_set)
    assert recipe.frames is not None and recipe.mean is not None and recipe.std is not None  # resolved

    # Everything that can reject an option comes before config.json, which marks the folder as a run.
    data = describe_data(train_set, val_set)
    saved = weights = of_weights = None
    if resume:
        saved = state.load_state(resume, describe(options, recipe) | data)
    elif options.branch_from:
        saved = state.load_state(options.branch_from, describe(options, recipe) | data, branch=True)
    elif options.init:
        weights = read_weights(options.init)
        of_weights = weights.stride_for(_model_name(options), recipe.frames, options.stride)
    stride = resolve_stride(options, saved and saved["config"], of_weights)
    options = dataclasses.replace(options, stride=stride)
    config = describe(options, recipe) | data
    features = FeatureExtractor(FeatureConfig(recipe.frames, recipe.mean, recipe.std, recipe.padding)).to(device)
    augment = Augment(**{f.name: getattr(recipe, f.name) for f in dataclasses.fields(Augment)})
    model = build_model(options, recipe, train_set.num_classes)
    if not saved:
        initialize(options, model, weights, of_weights)
    model.to(device)
    optimizer = make_optimizer(model, recipe)
    scaler = GradScaler(device.type, enabled=options.amp == "fp16")
    progress = state.restore(saved, model, optimizer, scaler) if saved else state.Progress()
    check_same_start(folder, (progress.epoch, progress.step) if saved else None)

    if distributed.is_main():
        if saved and not resume:
            for name, data in saved["files"].items():
                (folder / name).write_bytes(data.numpy().tobytes())
        write_config(folder, config, train_set, val_set)
    distributed.barrier()

    running: nn.Module = cast(nn.Module, torch.compile(model)) if options.compile else model
    if distributed.world_size() > 1:
        running = DistributedDataParallel(running, device_ids=[device.index] if device.type == "cuda" else None)
    step = progress.epoch * (len(train_set) // recipe.batch_size) + progress.step if saved else None
    log = RunLog(folder, keep_bytes=saved["log_bytes"] if saved else 0, step=step, tensorboard=options.tensorboard)
    return Trainer(
        options=options,
        recipe=recipe,
        config=config,
        folder=folder,
        device=device,
        model=model,
        running=running,
        features=features,
        augment=augment,
        optimizer=optimizer,
        scaler=scaler,
        train_set=train_set,
        val_set=val_set,
        test_set=splits["test"],
        progress=progress,
        log=log,
        stop=stop,
    )


def find_resume(options: Options) -> tuple[Path | None, Path]:
    """Find the checkpoint to resume from, None for a new run, and the output folder."""
    assert options.output is not None  # parse() sets it
    folder = Path(options.output)
    if options.resume is None:
        return None, folder
    if options.resume == state.LAST:
        path = folder / state.LAST
        if not path.exists():
            say(f"{path}: no checkpoint yet; starting from {options.branch_from or 'the beginning'}")
            return None, folder
        return path, folder
    path = Path(options.resume)
    path = path / state.LAST if path.is_dir() else path
    return path, path.parent


def check_same_start(folder: Path | str, start: tuple[int, int] | None) -> None:
    """Raise ``UserError`` unless all processes start at the same (epoch, step), or None for a new run.

    torchrun assigns new ranks at every start, so the process that saves may run on another machine than before.
    """
    starts = distributed.gather_objects(start)
    if any(other != starts[0] for other in starts):
        found = "; ".join(
            f"process {rank}: " + ("nothing" if place is None else "epoch {}, step {}".format(*place))
            for rank, place in enumerate(starts)
        )
        raise UserError(
            f"{folder}: the processes found different checkpoints in this folder ({found}): --output must be a folder "
            "that all machines share"
        )


def write_config(folder: Path, config: dict[str, Any], train_set: ClipDataset, val_set: ClipDataset) -> None:
    """Write config.json, with all resolved values and the versions used, and the list of missing clips."""
    versions = {"pruneattn": VERSION, "torch": torch.__version__, "python": platform.python_version()}
    counts = {"val_clips": len(val_set), "processes": distributed.world_size()}
    write_json(folder / state.CONFIG, {**config, **counts, "versions": versions, "command": sys.argv})
    missing = [str(path) for path in [*train_set.missing, *val_set.missing]]
    if missing:
        write_lines(folder / state.MISSING, missing)
        say(f"{len(missing)} listed clips do not exist; they are listed in {folder / state.MISSING}")
