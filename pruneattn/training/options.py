"""The command line of training, made from the fields of `Options` and `Recipe`, and the checks on what was given."""

import argparse
import dataclasses
import math
import types
from dataclasses import dataclass
from itertools import zip_longest
from typing import Union, get_args, get_origin, get_type_hints

from ..errors import UserError
from .recipes import RECIPES, Recipe, option, recipe_for

#: Value of --resume without a path: the last checkpoint of --output.
LAST = "last.pt"


@dataclass(frozen=True)
class Options:
    """What to train on what, where, and where the results go; how is in the `Recipe`."""

    # Model
    model: str = option("audiomae", "model", "model", choices=("audiomae", "ast"))
    size: str = option("base", "model", "its size", choices=("tiny", "small", "base", "large"))
    embed_dim: int | None = option(None, "model", "width (the size's)")
    depth: int | None = option(None, "model", "blocks (the size's)")
    num_heads: int | None = option(None, "model", "attention heads (the size's)")
    init: str | None = option(None, "model", "checkpoint to start from, in any of the known formats", metavar="FILE")

    # Data
    dataset: str = option("toy", "data", "as20k, spc2, esc50, voxceleb1, toy, manifest or folder", metavar="NAME")
    data_dir: str | None = option(None, "data", "where it is (else the variable PRUNEATTN_DATA)", metavar="DIR")
    fold: int = option(1, "data", "esc50: the fold that is held out")
    train_manifest: str | None = option(None, "data", "manifest: JSON file of the training clips", metavar="FILE")
    val_manifest: str | None = option(None, "data", "manifest: of the clips that choose the best", metavar="FILE")
    test_manifest: str | None = option(None, "data", "manifest: of the clips to report on", metavar="FILE")
    label_csv: str | None = option(None, "data", "manifest: CSV of labels (index,mid,display_name)", metavar="FILE")
    cache: bool = option(False, "data", "decode every clip once and keep the waveforms in memory")
    workers: int = option(0, "data", "processes that decode clips")

    # Run
    output: str | None = option(None, "run", "folder of the run (runs/MODEL_SIZE_DATASET)", metavar="DIR")
    resume: str | None = option(
        None,
        "run",
        "go on with the run in --output, which starts now where there is no checkpoint yet, or with that of "
        "this folder or checkpoint, which must be there",
        metavar="PATH",
    )
    branch_from: str | None = option(
        None,
        "run",
        "start from another run's trunk.pt, its state before pruning began; only --keep-rate, --score, "
        "--prune-blocks and --shrink-epochs may differ",
        metavar="FILE",
    )
    device: str = option("auto", "run", "auto, cpu, cuda or cuda:N", metavar="NAME")
    amp: str = option("fp32", "run", "precision of the model", choices=("fp32", "bf16", "fp16"))
    compile: bool = option(False, "run", "compile the model with torch.compile")
    deterministic: bool = option(False, "run", "deterministic algorithms only: a GPU repeats a run bit for bit")
    seed: int = option(0, "run", "seed of everything random")
    eval_every: int = option(1, "run", "epochs between evaluations (the last is always evaluated)")
    save_minutes: float = option(10.0, "run", "minutes between checkpoints within an epoch (each epoch ends with one)")
    log_every: int = option(20, "run", "optimiser steps between step lines in the log")
    tensorboard: bool = option(True, "run", "write TensorBoard events too")


#: Options that decide where and how fast, not what is computed: they may change when a run is resumed.
PLACE = {
    "data_dir",
    "cache",
    "workers",
    "output",
    "resume",
    "branch_from",
    "device",
    "compile",
    "deterministic",
    "save_minutes",
    "log_every",
    "tensorboard",
    "init",
    "train_manifest",
    "val_manifest",
    "test_manifest",
    "label_csv",
}
#: What has no effect before the first pruned epoch, so that runs which differ only in these share a trunk.
PRUNING = {"keep_rate", "shrink_epochs", "prune_blocks", "score"}
#: What checkpoints of the first versions do not know of their data; these go on without the comparison.
_DATA = {"labels", "train_clips_digest", "val_clips_digest"}

#: What options must be, in words: the test of a number, and the options.
_RANGES = {
    "at least 1": (lambda x: x >= 1, "epochs batch_size accumulate lr_batch lr_step_every eval_every log_every"),
    "at least 0": (
        lambda x: x >= 0,
        "shrink_start shrink_epochs warmup_steps lr_step_first workers clip_grad save_minutes",
    ),
    "at least 0 and finite": (
        lambda x: 0 <= x < math.inf,
        "lr min_lr warmup_epochs weight_decay layer_decay lr_step_factor",
    ),
    "at least 0 and below 1": (lambda x: 0 <= x < 1, "betas"),
    "above 0 and at most 1": (lambda x: 0 < x <= 1, "keep_rate"),
    "above 0 and finite": (lambda x: 0 < x < math.inf, "std"),
    "finite": (math.isfinite, "mean"),
    "at least 0 and below 2**63": (lambda x: 0 <= x < 2**63, "seed"),  # what torch takes
}

_GROUPS = {
    "model": "model",
    "data": "data",
    "run": "run",
    "steps": "recipe: steps",
    "optimiser": "recipe: optimiser",
    "pruning": "recipe: pruning",
    "input": "recipe: input",
    "augmentation": "recipe: augmentation",
}


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        if action.default is None or action.default is argparse.SUPPRESS:
            return action.help
        if isinstance(action.default, tuple):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


def _value_type(hint):
    """(type of one value, number of values as argparse's nargs) of a field's type hint."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(arg for arg in get_args(hint) if arg is not type(None))
    if get_origin(hint) is tuple:
        args = get_args(hint)
        return args[0], "+" if args[-1] is Ellipsis else len(args)
    return hint, None


def _add_options(parser, groups, instance):
    hints = get_type_hints(type(instance))
    for field in dataclasses.fields(instance):
        name = field.metadata["group"]
        if name not in groups:
            groups[name] = parser.add_argument_group(_GROUPS[name])
        kind, nargs = _value_type(hints[field.name])
        settings = {"help": field.metadata["help"], "default": getattr(instance, field.name)}
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings.update(type=kind, choices=field.metadata["choices"])
            if nargs:
                settings.update(nargs=nargs, metavar={int: "N", float: "X"}[kind])
            elif not field.metadata["choices"]:
                settings["metavar"] = field.metadata["metavar"] or {int: "N", float: "X"}[kind]
        if field.name == "resume":
            settings.update(nargs="?", const=LAST)
        groups[name].add_argument("--" + field.name.replace("_", "-"), **settings)


def parse(argv=None):
    """Read the command line: ``(Options, Recipe)``, checked. Options of the recipe default to the pair's recipe."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--model", default="audiomae")
    first.add_argument("--dataset", default="toy")
    known, _ = first.parse_known_args(argv)
    recipe = recipe_for(known.model, known.dataset)
    pairs = ", ".join(f"{model} {dataset}" for model, dataset in RECIPES)
    parser = argparse.ArgumentParser(
        prog="python -m pruneattn.train",
        usage="%(prog)s [--model MODEL] [--dataset NAME] [options]",
        description="Train a pruned AudioMAE or AST. The recipe defaults to the paper's for these pairs of --model and "
        f"--dataset: {pairs}; elsewhere to one for training from random weights. Give both with --help to see its "
        "values.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    groups = {}
    _add_options(parser, groups, Options())
    _add_options(parser, groups, recipe)
    values = vars(parser.parse_args(argv))
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    if values["output"] is None:
        values["output"] = "runs/{model}_{size}_{dataset}".format_map(values)
    options = Options(**{f.name: values[f.name] for f in dataclasses.fields(Options)})
    recipe = Recipe(**{f.name: values[f.name] for f in dataclasses.fields(Recipe)})
    check(options, recipe)
    return options, recipe


def check(options, recipe):
    """Raise ``UserError`` for values that cannot work, before anything is loaded."""
    values = describe(options, recipe)
    for words, (fits, names) in _RANGES.items():
        for name in names.split():
            given = values[name] if isinstance(values[name], list) else [values[name]]
            if not all(number is None or fits(number) for number in given):
                raise UserError(f"--{name.replace('_', '-')} must be {words}, got {' '.join(map(str, given))}")
    if len(recipe.keep_rate) not in (1, len(recipe.prune_blocks)):
        blocks = len(recipe.prune_blocks)
        raise UserError(f"--keep-rate takes one value or one per pruning block ({blocks}), got {len(recipe.keep_rate)}")
    if recipe.frames is not None and (recipe.frames < 16 or recipe.frames % 16):
        raise UserError(f"--frames must be a multiple of 16, got {recipe.frames}")
    last = recipe.shrink_start + recipe.shrink_epochs
    if min(recipe.keep_rate) < 1 and last >= recipe.epochs:
        raise UserError(
            f"the keep-rate reaches {min(recipe.keep_rate)} only in epoch {last} (--shrink-start {recipe.shrink_start} "
            f"plus --shrink-epochs {recipe.shrink_epochs}), but the run ends with epoch {recipe.epochs - 1}: give more "
            f"--epochs or shrink earlier, such as --shrink-start {recipe.epochs // 4} "
            f"--shrink-epochs {recipe.epochs // 3}"
        )
    if options.resume not in (None, LAST) and options.branch_from:
        raise UserError(
            "--resume PATH continues a run, --branch-from starts a new one: give one of them, or --resume without a "
            "path, which branches only where --output has no checkpoint yet"
        )


def describe(options, recipe):
    """All options and recipe values as one flat dict of plain values (lists for tuples), as saved in config.json."""
    values = {**dataclasses.asdict(options), **dataclasses.asdict(recipe)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def differences(old, new, ignore=frozenset()):
    """Lines ``name: old -> new`` for the values of two configurations that differ and matter to the result."""
    ignore = PLACE | set(ignore) | (_DATA - old.keys())
    names = [name for name in {**old, **new} if name not in ignore and old.get(name) != new.get(name)]
    return [f"{name}: " + " -> ".join(_first_difference(old.get(name), new.get(name))) for name in names]


def _first_difference(old, new):
    """Two values as texts; of long lists, such as the labels, the first items that differ."""
    if isinstance(old, list) and isinstance(new, list) and max(len(old), len(new)) > 8:
        old, new = next(pair for pair in zip_longest(old, new) if pair[0] != pair[1])
    return str(old), str(new)
