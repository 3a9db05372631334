"""Whether a provider computes what it claims: nothing that does not is timed."""

import math

import torch

#: Largest difference from the reference, as a share of its largest value.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
#: Scores of one block nearer than this share of the highest are the same to rounding: either patch may stay.
SAME_SCORE = 1e-4


class WrongResult(Exception):
    """A provider does not compute what it is compared with."""


def check_close(what, result, expected, tolerance):
    """Raise unless no value is further from the reference than ``tolerance`` times the reference's largest value.

    ``what``: the values in words, in the plural.
    """
    if result.shape != expected.shape:
        raise WrongResult(f"{what} have shape {list(result.shape)}, not {list(expected.shape)}")
    difference = ((result.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
    if not difference <= tolerance:
        raise WrongResult(f"{what} differ by {difference:.2g} of the largest value, allowed are {tolerance:g}")


def check_same(what, result, expected):
    """Raise unless all values are the reference's."""
    if not torch.equal(result, expected):
        raise WrongResult(f"{what} are not the reference's")


def check_kept(kept, trace):
    """Raise unless these are the patches of a ``pruneattn.trace``, but for scores that are the same to rounding."""
    for clip in range(len(trace.logits)):
        numbers = torch.arange(trace.scores[0].shape[1])
        for block, (theirs, ours, scores) in enumerate(zip(kept, trace.kept, trace.scores, strict=True)):
            score_of = dict(zip(numbers.tolist(), scores[clip].tolist()))
            disputed = set(theirs[clip].tolist()) ^ set(ours[clip].tolist())
            if disputed:
                values = [score_of.get(number, math.inf) for number in disputed]
                if not max(values) - min(values) <= SAME_SCORE * scores[clip].max().item():
                    raise WrongResult(f"keeps other patches in pruning block {block} of clip {clip}")
                break  # what follows has another input
            numbers = ours[clip]
