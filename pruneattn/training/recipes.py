"""The paper's training recipes as data, and one for training from scratch. Every field is a command line option."""

from dataclasses import dataclass, field, replace

from ..models.scores import SCORES


def option(default, group, text, choices=None, metavar=None):
    """A dataclass field that the command line offers as an option of the same name."""
    return field(default=default, metadata={"group": group, "help": text, "choices": choices, "metavar": metavar})


@dataclass(frozen=True)
class Recipe:
    """How to train. The defaults here are those for training from random weights; `RECIPES` holds the paper's."""

    # Steps
    epochs: int = option(40, "steps", "passes over the training clips")
    batch_size: int = option(
        64, "steps", "clips of one optimiser step, all processes and accumulated parts together (the effective batch)"
    )
    accumulate: int = option(1, "steps", "parts that each process cuts its share of a batch into, to save memory")

    # Optimiser
    optimizer: str = option("adamw", "optimiser", "rule", choices=("adamw", "adam"))
    lr: float = option(3e-3, "optimiser", "peak learning rate at --lr-batch clips a step; proportional to --batch-size")
    lr_batch: int = option(256, "optimiser", "batch that --lr is meant for")
    schedule: str = option(
        "cosine", "optimiser", "decay: cosine in every step, or steps by epoch", choices=("cosine", "step")
    )
    min_lr: float = option(1e-5, "optimiser", "where the cosine ends")
    lr_step_first: int = option(10, "optimiser", "step decay: first epoch (from 0) that is decayed")
    lr_step_every: int = option(5, "optimiser", "step decay: epochs between decays")
    lr_step_factor: float = option(0.5, "optimiser", "step decay: factor of each decay")
    warmup_epochs: float = option(4.0, "optimiser", "linear warm-up, in epochs")
    warmup_steps: int = option(0, "optimiser", "linear warm-up, in optimiser steps (added to --warmup-epochs)")
    betas: tuple[float, float] = option((0.9, 0.95), "optimiser", "decay rates of the moments")
    weight_decay: float = option(0.05, "optimiser", "weight decay of matrices (biases, norms and tokens have none)")
    layer_decay: float = option(1.0, "optimiser", "learning rate factor from each layer to the one below")
    drop_path: float = option(0.1, "optimiser", "stochastic depth of the last block (linear from 0)")
    clip_grad: float = option(0.0, "optimiser", "largest gradient norm (0: no clipping)")
    loss: str = option(
        "auto", "optimiser", "auto: bce where a clip can have several labels, else ce", choices=("auto", "bce", "ce")
    )
    metric: str = option(
        "auto",
        "optimiser",
        "what the best checkpoint is chosen by (auto: map where a clip can have several labels, else top1)",
        choices=("auto", "map", "top1"),
    )

    # Pruning
    keep_rate: tuple[float, ...] = option(
        (1.0,), "pruning", "share of patches kept in the end, in (0, 1]: one, or one per pruning block"
    )
    shrink_start: int = option(
        12, "pruning", "epoch (from 0) in which pruning starts, and SpecAugment and patch masking stop"
    )
    shrink_epochs: int = option(16, "pruning", "epochs over which the keep-rate falls from 1 to --keep-rate")
    prune_blocks: tuple[int, ...] = option((3, 6, 9), "pruning", "blocks (from 0) that prune")
    score: str | None = option(
        None,
        "pruning",
        "what ranks patches (the paper's for the model)",
        choices=SCORES,
    )

    # Input
    frames: int | None = option(None, "input", "10 ms frames of a clip, a multiple of 16 (the dataset's)")
    padding: str = option(
        "min", "input", "pad short clips with the spectrogram's floor, or with 0", choices=("min", "zero")
    )
    mean: float | None = option(None, "input", "mean of the log-mel (the dataset's; measured for manifest and folder)")
    std: float | None = option(None, "input", "standard deviation of the log-mel (likewise)")

    # Augmentation
    gain: bool = option(True, "augmentation", "random gain of the waveform")
    mixup: float = option(0.3, "augmentation", "share of clips that are mixed with another")
    specaug_freq: int = option(24, "augmentation", "widest frequency band that SpecAugment blanks, in mel bins")
    specaug_time: int = option(24, "augmentation", "widest time band that SpecAugment blanks, in frames")
    noise: bool = option(True, "augmentation", "noise on the spectrogram and a shift of up to 10 frames")
    mask_time: float = option(0.0, "augmentation", "share of patch columns (time) left out")
    mask_freq: float = option(0.0, "augmentation", "share of patch rows (frequency) left out")
    mask_1d: float = option(0.0, "augmentation", "share of single patches left out, instead of columns and rows")

    @property
    def keep_rates(self):
        """Tuple of the share that each pruning block keeps in the end, also where ``keep_rate`` is one for all."""
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

# The paper's AudioMAE runs use two GPUs, so `batch_size` is twice its batch per GPU. AST's learning rates are given
# for their batch, hence lr_batch == batch_size. The paper has no gain, drop path or patch masking in AST's table.
RECIPES = {
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


def recipe_for(model, dataset):
    """The paper's recipe for ``model`` ("audiomae", "ast") on ``dataset``, else the one for training from scratch."""
    return RECIPES.get((model, dataset), Recipe())
