"""From a command line to a `Trainer`: data, model, optimiser, and the state to go on from."""

import dataclasses
import hashlib
import platform
import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from ..constants import VERSION
from ..data import DATASETS, FeatureConfig, FeatureExtractor, load_dataset
from ..data.augment import Augment
from ..data.stats import dataset_stats
from ..errors import UserError
from ..files import write_json, write_lines
from ..models import create_model
from ..runtime import distributed
from . import state
from .engine import Trainer, seed_step
from .log import RunLog, say
from .optim import make_optimizer
from .options import describe
from .recipes import RECIPES


def open_splits(options, recipe):
    """Dict of the data sets train, val and test, not decoded; test is None where a manifest run has no manifest for it."""
    train_set = open_split(options, recipe, "train")
    # Asked of the training clips alone: those of a small val split may happen to have one label each.
    others = {split: open_split(options, recipe, split, train_set.multilabel) for split in ("val", "test")}
    return {"train": train_set, **others}


def open_split(options, recipe, split, multilabel=None):
    """The data set of a split, or None where a manifest run has no manifest for its test split.

    ``multilabel`` says whether a clip can have several classes, else the clips of the split do.
    """
    manifest = getattr(options, f"{split}_manifest")
    if options.dataset == "manifest" and manifest is None:
        if split == "test":
            return None
        raise UserError(f"--dataset manifest needs --{split}-manifest, a JSON file of clips")
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


def resolve(recipe, info, dataset):
    """The recipe with everything filled in that the data decides."""
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


def measure(dataset):
    """Mean and standard deviation of the log-mel over up to 1000 clips of a data set, rounded."""
    count = min(len(dataset), 1000)
    clips = torch.utils.data.Subset(dataset, [i * len(dataset) // count for i in range(count)])
    stats = dataset_stats(clips, progress=False)
    say(f"measured on {stats.clips} training clips: --mean {stats.mean:.3f} --std {stats.std:.3f}")
    return round(stats.mean, 3), round(stats.std, 3)


def describe_data(train_set, val_set):
    """The classes, and the clips by name and labels, wherever they lie: a run that goes on has to find the same."""

    def digest(dataset):
        lines = "".join(f"{clip.path.name} {clip.labels}\n" for clip in dataset.clips)
        return hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()[:16]

    return {
        "train_clips": len(train_set),
        "num_classes": train_set.num_classes,
        "labels": train_set.labels,
        "train_clips_digest": digest(train_set),
        "val_clips_digest": digest(val_set),
    }


def build_model(options, recipe, num_classes):
    """The model with fresh weights that depend on the seed alone."""
    seed_step(options.seed, -1)
    return create_model(
        f"{options.model}_{options.size}",
        num_classes=num_classes,
        frames=recipe.frames,
        score=recipe.score,
        prune_blocks=recipe.prune_blocks,
        drop_path=recipe.drop_path,
        embed_dim=options.embed_dim,
        depth=options.depth,
        num_heads=options.num_heads,
    )


def initialise(options, recipe, model):
    """Load ``--init``, or say so where the paper's recipe expects a checkpoint and there is none."""
    if options.init:
        from ..checkpoints.load_checkpoint import load_checkpoint

        say(load_checkpoint(model, options.init))
    elif (options.model, options.dataset) in RECIPES:
        say("note: the paper's recipe is for a pre-trained model; without --init it starts from random weights")


def check_batch(recipe, train_set):
    """Raise ``UserError`` for a batch that cannot be shared out or filled."""
    parts = distributed.world_size() * recipe.accumulate
    if recipe.batch_size % parts:
        raise UserError(
            f"--batch-size {recipe.batch_size} cannot be shared out evenly: {distributed.world_size()} processes times "
            f"--accumulate {recipe.accumulate} make {parts} parts"
        )
    if len(train_set) < recipe.batch_size:
        raise UserError(
            f"{len(train_set)} training clips do not fill one batch: give a --batch-size of at most {len(train_set)}"
        )


def build_trainer(options, recipe, stop):
    """Everything set up; where the run goes on from a checkpoint, as it was then."""
    device = distributed.start(options.device)
    if options.deterministic:
        torch.use_deterministic_algorithms(True)
    resume, folder = find_resume(options)
    splits = open_splits(options, recipe)
    train_set, val_set = splits["train"], splits["val"]
    check_batch(recipe, train_set)
    if distributed.is_main():
        state.open_output(folder, going_on=options.resume is not None)
    if options.cache:
        train_set.fill_cache()
        val_set.fill_cache()
    recipe = resolve(recipe, DATASETS[options.dataset], train_set)
    config = describe(options, recipe) | describe_data(train_set, val_set)

    # All that can refuse an option comes before config.json, with which the folder holds a run.
    features = FeatureExtractor(FeatureConfig(recipe.frames, recipe.mean, recipe.std, recipe.padding)).to(device)
    augment = Augment(**{f.name: getattr(recipe, f.name) for f in dataclasses.fields(Augment)})
    model = build_model(options, recipe, train_set.num_classes)
    saved = None
    if resume:
        saved = state.load_state(resume, config)
    elif options.branch_from:
        saved = state.load_state(options.branch_from, config, branch=True)
    else:
        initialise(options, recipe, model)
    model.to(device)
    optimizer = make_optimizer(model, recipe)
    scaler = torch.amp.GradScaler(device.type, enabled=options.amp == "fp16")
    progress = state.restore(saved, model, optimizer, scaler) if saved else state.Progress()
    check_same_start(folder, saved and (progress.epoch, progress.step))

    if distributed.is_main():
        if saved and not resume:
            for name, data in saved["files"].items():
                (folder / name).write_bytes(data.numpy().tobytes())
        write_config(folder, config, train_set, val_set)
    distributed.barrier()

    running = torch.compile(model) if options.compile else model
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


def find_resume(options):
    """(checkpoint to go on from or None, output folder)."""
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


def check_same_start(folder, start):
    """Raise ``UserError`` unless all processes start at the same (epoch, step), None for a fresh start.

    torchrun gives out the ranks anew at every start, so that the one that saves may be on another machine than before.
    """
    starts = distributed.gather_objects(start)
    if any(other != starts[0] for other in starts):
        found = "; ".join(
            f"process {rank}: " + ("nothing" if place is None else "epoch {}, step {}".format(*place))
            for rank, place in enumerate(starts)
        )
        raise UserError(
            f"{folder}: the processes found different checkpoints there ({found}): --output must be one folder that all "
            "machines share"
        )


def write_config(folder, config, train_set, val_set):
    """config.json: every resolved value, and what it ran on; the missing clips in a list of their own."""
    versions = {"pruneattn": VERSION, "torch": torch.__version__, "python": platform.python_version()}
    counts = {"val_clips": len(val_set), "processes": distributed.world_size()}
    write_json(folder / state.CONFIG, {**config, **counts, "versions": versions, "command": sys.argv})
    missing = [str(path) for path in [*train_set.missing, *val_set.missing]]
    if missing:
        write_lines(folder / state.MISSING, missing)
        say(f"{len(missing)} listed clips are not there; their names are in {folder / state.MISSING}")
