"""Schedules as functions of the epoch or the step alone, so that a checkpoint need not contain their state."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .recipes import Recipe


def keep_rate_at(epoch: float, target: float, start: int, shrink_epochs: int) -> float:
    """Keep-rate of an epoch: 1 before ``start``, half a cosine over ``shrink_epochs``, then ``target``.

    Args:
        epoch: epoch from 0; can be a fraction.
        target: final keep-rate, in (0, 1].
        start: first epoch of the cosine.
        shrink_epochs: length of the cosine in epochs; 0 for an immediate change.
    """
    if epoch < start:
        return 1.0
    if epoch >= start + shrink_epochs:
        return target
    progress = (epoch - start) / shrink_epochs
    return target + (1.0 - target) * (1.0 + math.cos(math.pi * progress)) / 2.0


def pruning_started(epoch: int, targets: Sequence[float], start: int) -> bool:
    """Whether pruning has started in this epoch; always False if every target keep-rate is 1."""
    return epoch >= start and min(targets) < 1.0


def learning_rate(step: int, recipe: Recipe, steps_per_epoch: int) -> float:
    """Learning rate of an optimizer step (from 0), without the factor of the layer.

    The peak is ``recipe.lr * recipe.batch_size / recipe.lr_batch``. The linear warm-up reaches the peak in its last
    step. The cosine reaches ``recipe.min_lr`` in the last step of the run. The step schedule changes between epochs.
    """
    peak = recipe.lr * recipe.batch_size / recipe.lr_batch
    warmup = recipe.warmup_steps + round(recipe.warmup_epochs * steps_per_epoch)
    total = recipe.epochs * steps_per_epoch
    done = step + 1
    if done < warmup:
        return peak * done / warmup
    if recipe.schedule == "cosine":
        progress = (done - warmup) / max(1, total - warmup)
        return recipe.min_lr + (peak - recipe.min_lr) * (1.0 + math.cos(math.pi * progress)) / 2.0
    epoch = step // steps_per_epoch
    decays = max(0, (epoch - recipe.lr_step_first) // recipe.lr_step_every + 1)
    return peak * recipe.lr_step_factor**decays
