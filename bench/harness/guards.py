"""Checks that a provider computes the expected result. Providers that fail a check are not timed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from pruneattn.models.trace import Trace

#: Largest difference from the reference, relative to the reference's largest value.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
#: Scores of one block that differ by less than this fraction of the largest score are equal up to rounding, so that
#: either patch may be kept.
SAME_SCORE = 1e-4


class WrongResult(Exception):
    """The result of a provider differs from the reference."""


def check_close(what: str, result: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Check that all values are close to the reference.

    Args:
        what: name of the values, in the plural, for the message.
        result: values of the provider.
        expected: values of the reference.
        tolerance: largest difference, relative to the largest value of `expected`.

    Raises:
        WrongResult: the shapes differ, a value differs by more, or a value is not finite.
    """
    if result.shape != expected.shape:
        raise WrongResult(f"{what} have shape {list(result.shape)}, not {list(expected.shape)}")
    difference = ((result.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
    if not difference <= tolerance:
        raise WrongResult(f"{what} differ by {difference:.2g} of the largest value, allowed are {tolerance:g}")


def check_same(what: str, result: torch.Tensor, expected: torch.Tensor) -> None:
    """Check that all values are equal to the reference.

    Raises:
        WrongResult: a value or the shape differs.
    """
    if not torch.equal(result, expected):
        raise WrongResult(f"{what} are not the reference's")


def check_kept(kept: Sequence[torch.Tensor], trace: Trace) -> None:
    """Check that the patches kept are those of a ``pruneattn.trace``, except where scores are equal up to rounding.

    Args:
        kept: numbers of the input patches that each pruning block keeps ``[B, k_i]``.
        trace: the trace of the reference.

    Raises:
        WrongResult: other patches were kept.
    """
    for clip in range(len(trace.logits)):
        numbers = torch.arange(trace.scores[0].shape[1])
        for block, (theirs, ours, scores) in enumerate(zip(kept, trace.kept, trace.scores, strict=True)):
            score_of = dict(zip(numbers.tolist(), scores[clip].tolist()))
            disputed = set(theirs[clip].tolist()) ^ set(ours[clip].tolist())
            if disputed:
                values = [score_of.get(number, math.inf) for number in disputed]
                if not max(values) - min(values) <= SAME_SCORE * scores[clip].max().item():
                    raise WrongResult(f"keeps other patches in pruning block {block} of clip {clip}")
                break  # the later blocks have different inputs
            numbers = ours[clip]
