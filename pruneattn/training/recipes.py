"""The paper's training recipes as data, and a recipe for random weights. Every field is a command line option."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..constants import PATCH
from ..models.scores import SCORES


def option(
    default: Any,
    group: str,
    text: str,
    choices: Sequence[str] | None = None,
    metavar: str | None = None,
    parse: Callable[[str], Any] | None = None,
) -> Any:
    """Declare a dataclass field that is also a command line option of the same name.

    Args:
        default: default value; None if something else decides, which ``text`` names.
        group: group of the option in ``--help``.
        text: help text of the option.
        choices: allowed values.
        metavar: name of the value in ``--help``.
        parse: converts one word to the value; None for a conversion by the type of the field.
    """
    metadata = {"group": group, "help": text, "choices": choices, "metavar": metavar, "parse": parse}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Recipe:
    """Settings of the training. The defaults are for random weights; `RECIPES` holds the paper's recipes."""

    # Steps
    epochs: int = option(40, "steps", "passes over the training clips")
    batch_size: int = option(
        64, "steps", "clips per optimizer step over all processes and accumulated parts (the effective batch)"
    )
    accumulate: int = option(1, "steps", "parts into which each process splits its share of a batch, to save memory")

    # Optimizer
    optimizer: str = option("adamw", "optimizer", "optimizer", choices=("adamw", "adam"))
    lr: float = option(3e-3, "optimizer", "peak learning rate for --lr-batch clips per step; scales with --batch-size")
    lr_batch: int = option(256, "optimizer", "batch size to which --lr applies")
    schedule: str = option(
        "cosine",
        "optimizer",
        "decay: cosine (changes every optimizer step) or step (changes between epochs)",
        choices=("cosine", "step"),
    )
    min_lr: float = option(1e-5, "optimizer", "final learning rate of the cosine")
    lr_step_first: int = option(10, "optimizer", "step decay: first epoch (from 0) with a decayed learning rate")
    lr_step_every: int = option(5, "optimizer", "step decay: epochs between decays")
    lr_step_factor: float = option(0.5, "optimizer", "step decay: factor of each decay")
    warmup_epochs: float = option(4.0, "optimizer", "linear warm-up, in epochs")
    warmup_steps: int = option(0, "optimizer", "linear warm-up, in optimizer steps (added to --warmup-epochs)")
    betas: tuple[float, float] = option((0.9, 0.95), "optimizer", "decay rates of the moments")
    weight_decay: float = option(0.05, "optimizer", "weight decay of matrices; none for biases, norms and tokens")
    layer_decay: float = option(1.0, "optimizer", "factor of the learning rate from each layer to the layer below")
    drop_path: float = option(0.1, "optimizer", "stochastic depth rate of the last block (increases linearly from 0)")
    clip_grad: float = option(0.0, "optimizer", "maximum gradient norm (0: no clipping)")
    loss: str = option(
        "auto", "optimizer", "auto: bce if a clip can have several labels, else ce", choices=("auto", "bce", "ce")
    )
    metric: str = option(
        "auto",
        "optimizer",
        "metric that selects the best checkpoint (auto: map if a clip can have several labels, else top1)",
        choices=("auto", "map", "top1"),
    )

    # Pruning
    keep_rate: tuple[float, ...] = option(
        (1.0,),
        "pruning",
        "final fraction of the patches that each pruning block keeps, in (0, 1]: one number, or one per block",
    )
    shrink_start: int = option(
        12, "pruning", "epoch (from 0) in which pruning starts, and SpecAugment and patch masking end"
    )
    shrink_epochs: int = option(16, "pruning", "epochs over which the keep-rate falls from 1 to --keep-rate")
    prune_blocks: tuple[int, ...] = option((3, 6, 9), "pruning", "blocks (from 0) that prune")
    score: str | None = option(
        None,
        "pruning",
        "score that ranks patches (default: the paper's for the model)",
        choices=SCORES,
    )

    # Input
    frames: int | None = option(None, "input", f"10 ms frames of a clip, at least {PATCH} (default: the dataset's)")
    padding: str = option(
        "min",
        "input",
        "value that pads short clips: min, the floor of the spectrogram, or zero",
        choices=("min", "zero"),
    )
    mean: float | None = option(
        None, "input", "mean of the log-mel (default: the dataset's; measured for manifest and folder)"
    )
    std: float | None = option(
        None, "input", "standard deviation of the log-mel (default: the dataset's; measured for manifest and folder)"
    )

    # Augmentation
    gain: bool = option(True, "augmentation", "random gain of the waveform")
    mixup: float = option(0.3, "augmentation", "fraction of the clips that are mixed with another clip")
    specaug_freq: int = option(24, "augmentation", "widest frequency band that SpecAugment masks, in mel bins")
    specaug_time: int = option(24, "augmentation", "widest time band that SpecAugment masks, in frames")
    noise: bool = option(True, "augmentation", "noise on the spectrogram, and a shift of up to 10 frames")
    mask_time: float = option(0.0, "augmentation", "fraction of the patch columns (time) that are left out")
    mask_freq: float = option(0.0, "augmentation", "fraction of the patch rows (frequency) that are left out")
    mask_1d: float = option(
        0.0, "augmentation", "fraction of single patches that are left out, instead of columns and rows"
    )

    @property
    def keep_rates(self) -> tuple[float, ...]:
        """Final keep-rate of each pruning block, also if ``keep_rate`` is a single number."""
        return self.keep_rate * (len(self.prune_blocks) // len(self.keep_rate))


_AUDIOMAE = Recipe(
    optimizer="adamw",
    betas=(0.9, 0.95),
    weight_decay=1e-4,
    layer_decay=0.75,
    drop_path=0.1,
    clip_grad=0.0,
    lr=1e-3,
    lr_batch=256,
    schedule="cosine",
    min_lr=1e-5,
    warmup_epochs=4.0,
    warmup_steps=0,
    padding="min",
)
_AST = Recipe(
    optimizer="adam",
    betas=(0.95, 0.999),
    weight_decay=5e-7,
    layer_decay=1.0,
    drop_path=0.0,
    clip_grad=0.0,
    epochs=30,
    schedule="step",
    warmup_epochs=0.0,
    warmup_steps=0,
    padding="min",
    gain=False,
)

# The paper trains AudioMAE on two GPUs, so `batch_size` is twice its batch per GPU. Its learning rates of AST apply to
# the batch of the same table, hence lr_batch == batch_size. Its table of AST has no gain, drop path or patch masking.
#: The paper's recipes by (model, dataset).
RECIPES: dict[tuple[str, str], Recipe] = {
    ("audiomae", "as20k"): replace(
        _AUDIOMAE,
        batch_size=2 * 16,
        epochs=60,
        shrink_start=30,
        shrink_epochs=20,
        frames=1024,
        mask_time=0.3,
        mask_freq=0.3,
        specaug_freq=48,
        specaug_time=192,
        mixup=0.5,
        gain=True,
        noise=False,
        loss="bce",
        metric="map",
    ),
    ("audiomae", "spc2"): replace(
        _AUDIOMAE,
        batch_size=2 * 256,
        epochs=90,
        shrink_start=10,
        shrink_epochs=30,
        frames=128,
        specaug_freq=48,
        specaug_time=48,
        mixup=0.5,
        gain=True,
        noise=True,
        loss="bce",
        metric="top1",
    ),
    ("audiomae", "esc50"): replace(
        _AUDIOMAE,
        batch_size=2 * 64,
        epochs=120,
        shrink_start=20,
        shrink_epochs=40,
        frames=512,
        mask_time=0.3,
        mask_freq=0.3,
        specaug_freq=24,
        specaug_time=96,
        mixup=0.0,
        gain=True,
        noise=False,
        loss="ce",
        metric="top1",
    ),
    ("audiomae", "voxceleb1"): replace(
        _AUDIOMAE,
        batch_size=2 * 32,
        epochs=90,
        shrink_start=20,
        shrink_epochs=40,
        frames=1024,
        specaug_freq=48,
        specaug_time=192,
        mixup=0.0,
        gain=False,
        noise=True,
        loss="ce",
        metric="top1",
    ),
    ("ast", "as20k"): replace(
        _AST,
        batch_size=64,
        lr_batch=64,
        lr=1e-4,
        lr_step_first=10,
        lr_step_every=5,
        lr_step_factor=0.5,
        warmup_steps=1000,
        shrink_start=15,
        shrink_epochs=10,
        frames=1024,
        specaug_freq=48,
        specaug_time=192,
        mixup=0.5,
        noise=False,
        loss="bce",
        metric="map",
    ),
    ("ast", "spc2"): replace(
        _AST,
        batch_size=128,
        lr_batch=128,
        lr=2.5e-4,
        lr_step_first=5,
        lr_step_every=1,
        lr_step_factor=0.85,
        shrink_start=5,
        shrink_epochs=15,
        frames=128,
        specaug_freq=48,
        specaug_time=48,
        mixup=0.6,
        noise=True,
        loss="bce",
        metric="top1",
    ),
    ("ast", "esc50"): replace(
        _AST,
        batch_size=48,
        lr_batch=48,
        lr=1e-5,
        lr_step_first=5,
        lr_step_every=1,
        lr_step_factor=0.85,
        shrink_start=5,
        shrink_epochs=15,
        frames=512,
        specaug_freq=24,
        specaug_time=96,
        mixup=0.0,
        noise=False,
        loss="ce",
        metric="top1",
    ),
}


def recipe_for(model: str, dataset: str) -> Recipe:
    """The paper's recipe for ``model`` ("audiomae" or "ast") on ``dataset``, else the recipe for random weights."""
    return RECIPES.get((model, dataset), Recipe())
