"""Random numbers that depend only on the position in a run."""

from __future__ import annotations

import torch


def seed_step(*numbers: int) -> None:
    """Seed torch's generators from the position in the run, so that random numbers need no state in a checkpoint."""
    seed = 0
    for number in numbers:  # splitmix64 over the parts: adjacent positions get unrelated seeds
        seed = (seed + number + 0x9E3779B97F4A7C15) % 2**64
        seed = (seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        seed = (seed ^ (seed >> 27)) * 0x94D049BB133111EB % 2**64
        seed ^= seed >> 31
    torch.manual_seed(seed)
