"""The command line of training, built from the fields of `Options` and `Recipe`, and the checks of its values."""

from __future__ import annotations

import argparse
import dataclasses
import math
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Union, get_args, get_origin, get_type_hints

from ..constants import PATCH
from ..errors import UserError
from ..models.patches import STRIDE_HELP, parse_stride
from .recipes import RECIPES, Recipe, option, recipe_for

#: Value of --resume without a path: the last checkpoint of --output.
LAST = "last.pt"


@dataclass(frozen=True)
class Options:
    """Model, data, device and output of a run. The `Recipe` holds the training itself."""

    # Model
    model: str = option("audiomae", "model", "model family", choices=("audiomae", "ast"))
    size: str = option("base", "model", "size of the model", choices=("tiny", "small", "base", "large"))
    embed_dim: int | None = option(None, "model", "width (default: that of the size)")
    depth: int | None = option(None, "model", "number of blocks (default: that of the size)")
    num_heads: int | None = option(None, "model", "number of attention heads (default: that of the size)")
    stride: tuple[int, int] | None = option(
        None,
        "model",
        f"{STRIDE_HELP} (default: that of the checkpoint --init, else {PATCH})",
        metavar="S",
        parse=parse_stride,
    )
    init: str | None = option(None, "model", "checkpoint with initial weights, in any supported format", metavar="FILE")

    # Data
    dataset: str = option("toy", "data", "as20k, spc2, esc50, voxceleb1, toy, manifest or folder", metavar="NAME")
    data_dir: str | None = option(
        None, "data", "folder of the data (default: the variable PRUNEATTN_DATA)", metavar="DIR"
    )
    fold: int = option(1, "data", "esc50: held-out fold")
    train_manifest: str | None = option(None, "data", "manifest: JSON file of the training clips", metavar="FILE")
    val_manifest: str | None = option(None, "data", "manifest: JSON file of the validation clips", metavar="FILE")
    test_manifest: str | None = option(None, "data", "manifest: JSON file of the test clips", metavar="FILE")
    label_csv: str | None = option(None, "data", "manifest: CSV of labels (index,mid,display_name)", metavar="FILE")
    cache: bool = option(False, "data", "decode every clip once and keep the waveforms in memory")
    workers: int = option(0, "data", "number of processes that decode clips")

    # Run
    output: str | None = option(None, "run", "folder of the run (default: runs/MODEL_SIZE_DATASET)", metavar="DIR")
    resume: str | None = option(
        None,
        "run",
        "resume the run in --output, or start it if there is no checkpoint yet; with a PATH, resume the run of this "
        "folder or checkpoint, which must exist",
        metavar="PATH",
    )
    branch_from: str | None = option(
        None,
        "run",
        "start from the trunk.pt of another run, its state before pruning started; only --keep-rate, --score, "
        "--prune-blocks and --shrink-epochs may differ",
        metavar="FILE",
    )
    device: str = option("auto", "run", "auto, cpu, cuda or cuda:N", metavar="NAME")
    amp: str = option("fp32", "run", "precision of the model", choices=("fp32", "bf16", "fp16"))
    compile: bool = option(False, "run", "compile the model with torch.compile")
    deterministic: bool = option(
        False, "run", "use only deterministic algorithms, so that a GPU repeats a run bit for bit"
    )
    seed: int = option(0, "run", "seed of all random numbers")
    eval_every: int = option(1, "run", "epochs between evaluations; the last epoch is always evaluated")
    save_minutes: float = option(
        10.0, "run", "minutes between checkpoints within an epoch; each epoch ends with a checkpoint"
    )
    log_every: int = option(20, "run", "optimizer steps between step lines in the log")
    tensorboard: bool = option(True, "run", "also write TensorBoard events")


#: Options that affect only the place and the speed of a run. They may change when a run resumes.
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
#: Options without effect before the first pruned epoch. Runs that differ only in these share a trunk.
PRUNING = {"keep_rate", "shrink_epochs", "prune_blocks", "score"}
#: Descriptions of the data that checkpoints of the first versions do not contain. Such runs resume unchecked.
_DATA = {"labels", "train_clips_digest", "val_clips_digest"}

#: Values that all runs had before the option existed. Checkpoints of these runs do not contain it.
_ADDED = {"stride": [PATCH, PATCH]}

#: Valid ranges, by their wording in messages: the test of a number, and the options to which the range applies.
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    f"at least {PATCH}": (lambda x: x >= PATCH, "frames"),
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
    "at least 0 and below 2**63": (lambda x: 0 <= x < 2**63, "seed"),  # the range that torch accepts
}

_GROUPS = {
    "model": "model",
    "data": "data",
    "run": "run",
    "steps": "recipe: steps",
    "optimizer": "recipe: optimizer",
    "pruning": "recipe: pruning",
    "input": "recipe: input",
    "augmentation": "recipe: augmentation",
}


_METAVARS: dict[type, str] = {int: "N", float: "X"}


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is argparse.SUPPRESS:
            return action.help
        # The recipe of the model and the dataset replaces a default that the help describes in words.
        text = (action.help or "").partition(" (default: ")[0]
        default = " ".join(map(str, action.default)) if isinstance(action.default, tuple) else "%(default)s"
        return f"{text} (default: {default})"


def _value_type(hint: Any) -> tuple[Any, int | str | None]:
    """Type of one value, and number of values (``nargs`` of argparse), for the type hint of a field."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(arg for arg in get_args(hint) if arg is not type(None))
    if get_origin(hint) is tuple:
        args = get_args(hint)
        return args[0], "+" if args[-1] is Ellipsis else len(args)
    return hint, None


def _add_options(
    parser: argparse.ArgumentParser, groups: dict[str, argparse._ArgumentGroup], instance: Options | Recipe
) -> None:
    """Add an option for each field of an instance, whose values are the defaults, to its group."""
    hints = get_type_hints(type(instance))
    for field in dataclasses.fields(instance):
        name = field.metadata["group"]
        if name not in groups:
            groups[name] = parser.add_argument_group(_GROUPS[name])
        parse = field.metadata["parse"]
        kind, nargs = _value_type(hints[field.name]) if parse is None else (parse, None)
        settings: dict[str, Any] = {"help": field.metadata["help"], "default": getattr(instance, field.name)}
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings.update(type=kind, choices=field.metadata["choices"])
            if nargs:
                settings.update(nargs=nargs, metavar=_METAVARS[kind])
            elif not field.metadata["choices"]:
                settings["metavar"] = field.metadata["metavar"] or _METAVARS[kind]
        if field.name == "resume":
            settings.update(nargs="?", const=LAST)
        groups[name].add_argument("--" + field.name.replace("_", "-"), **settings)


def parse(argv: Sequence[str] | None = None) -> tuple[Options, Recipe]:
    """Read and check a command line.

    Args:
        argv: words of the command line; None for those of this process.

    Returns:
        The options and the recipe. The defaults of the recipe are those of ``--model`` and ``--dataset``.

    Raises:
        UserError: a value is invalid.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--model", default="audiomae")
    first.add_argument("--dataset", default="toy")
    known, _ = first.parse_known_args(argv)
    recipe = recipe_for(known.model, known.dataset)
    pairs = ", ".join(f"{model} {dataset}" for model, dataset in RECIPES)
    parser = argparse.ArgumentParser(
        prog="pruneattn train",
        usage="%(prog)s [--model MODEL] [--dataset NAME] [options]",
        description="Train a pruned AudioMAE or AST. The defaults of the recipe are the paper's for these pairs of "
        f"--model and --dataset: {pairs}; for other pairs, they are meant for random weights. Pass both options with "
        "--help to see the values.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
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


def check(options: Options, recipe: Recipe) -> None:
    """Raise ``UserError`` for invalid values, before anything is loaded."""
    values = describe(options, recipe)
    for words, (fits, names) in _RANGES.items():
        for name in names.split():
            given = values[name] if isinstance(values[name], list) else [values[name]]
            if not all(number is None or fits(number) for number in given):
                raise UserError(f"--{name.replace('_', '-')} must be {words}, got {' '.join(map(str, given))}")
    if len(recipe.keep_rate) not in (1, len(recipe.prune_blocks)):
        blocks = len(recipe.prune_blocks)
        raise UserError(f"--keep-rate takes one value or one per pruning block ({blocks}), got {len(recipe.keep_rate)}")
    last = recipe.shrink_start + recipe.shrink_epochs
    if min(recipe.keep_rate) < 1 and last >= recipe.epochs:
        raise UserError(
            f"the keep-rate reaches {min(recipe.keep_rate)} only in epoch {last} (--shrink-start {recipe.shrink_start} "
            f"plus --shrink-epochs {recipe.shrink_epochs}), but the run ends with epoch {recipe.epochs - 1}: increase "
            f"--epochs or prune earlier, for example with --shrink-start {recipe.epochs // 4} "
            f"--shrink-epochs {recipe.epochs // 3}"
        )
    if options.resume not in (None, LAST) and options.branch_from:
        raise UserError(
            "--resume PATH resumes a run, and --branch-from starts a new run: use one of them, or --resume without a "
            "path, which branches only if --output has no checkpoint yet"
        )


def describe(options: Options, recipe: Recipe) -> dict[str, Any]:
    """All values of options and recipe as a flat dict of plain values, as in config.json (lists for tuples)."""
    values = {**dataclasses.asdict(options), **dataclasses.asdict(recipe)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def differences(old: Mapping[str, Any], new: Mapping[str, Any], ignore: Collection[str] = ()) -> list[str]:
    """Compare two configurations of `describe`.

    Args:
        old: configuration of a checkpoint.
        new: configuration of the current run.
        ignore: names that may differ, in addition to those that do not affect the result.

    Returns:
        A text ``name: old -> new`` for each value that differs.
    """
    ignored = PLACE | set(ignore) | (_DATA - old.keys())
    if new.get("stride") is None:
        ignored.add("stride")  # not asked for: the run keeps its own
    old = {**_ADDED, **old}
    names = [name for name in {**old, **new} if name not in ignored and old.get(name) != new.get(name)]
    return [f"{name}: " + " -> ".join(_first_difference(old.get(name), new.get(name))) for name in names]


def _first_difference(old: Any, new: Any) -> tuple[str, str]:
    """Two values as texts; for long lists, for example of labels, the first items that differ."""
    if isinstance(old, list) and isinstance(new, list) and max(len(old), len(new)) > 8:
        old, new = next(pair for pair in zip_longest(old, new) if pair[0] != pair[1])
    return str(old), str(new)
