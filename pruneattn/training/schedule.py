"""What changes while training goes on, as functions of the epoch or the step alone: resuming needs no state."""

import math


def keep_rate_at(epoch, target, start, shrink_epochs):
    """Keep-rate of an epoch (from 0): 1 before ``start``, a half cosine over ``shrink_epochs``, then ``target``."""
    if epoch < start:
        return 1.0
    if epoch >= start + shrink_epochs:
        return target
    progress = (epoch - start) / shrink_epochs
    return target + (1.0 - target) * (1.0 + math.cos(math.pi * progress)) / 2.0


def pruning_started(epoch, targets, start):
    """Whether pruning has begun in this epoch; never where every target keep-rate is 1."""
    return epoch >= start and min(targets) < 1.0


def learning_rate(step, recipe, steps_per_epoch):
    """Learning rate of an optimiser step (from 0), before the factor of the layer.

    The peak is ``recipe.lr * recipe.batch_size / recipe.lr_batch``. Warm-up is linear and reaches the peak in its last
    step. The cosine reaches ``recipe.min_lr`` in the last step of the run; the step schedule changes between epochs.
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
