"""The stride of the patches on a spectrogram."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, TypeAlias

from ..constants import PATCH
from ..errors import UserError

#: Mel bins and frames from one patch to the next: one number, or ``(frequency, time)``.
Stride: TypeAlias = int | Sequence[int]
#: Help of the option ``--stride``, whose values ``parse_stride`` reads.
STRIDE_HELP = f"mel bins and frames from one patch to the next, 1 to {PATCH}: one number, or both as 10,16"


def check_stride(stride: Stride) -> tuple[int, int]:
    """Convert a stride to ``(frequency, time)``.

    Raises:
        UserError: it is neither one nor two whole numbers from 1 to 16.
    """
    given: Any = stride
    both = (given, given) if isinstance(given, int) else tuple(given) if isinstance(given, (tuple, list)) else ()
    if len(both) != 2 or not all(type(step) is int and 1 <= step <= PATCH for step in both):
        raise UserError(
            f"stride: expected a whole number from 1 to {PATCH}, or two of them (frequency, time), got {stride!r}"
        )
    return both


def parse_stride(text: str) -> tuple[int, int]:
    """Read ``"10"`` or ``"10,16"``, the inverse of :func:`stride_text`, as a type of ``argparse``."""
    words = text.split(",")
    try:
        steps = [int(word) for word in words]
        return check_stride(steps[0] if len(steps) == 1 else steps)
    except ValueError:  # of int or of check_stride
        raise argparse.ArgumentTypeError(
            f"expected a whole number from 1 to {PATCH}, or two (frequency, time) as 10,16, got {text!r}"
        ) from None


def stride_text(stride: tuple[int, int]) -> str:
    """A stride as options and messages write it: ``10``, or ``10,16`` for frequency and time."""
    return f"{stride[0]}" if stride[0] == stride[1] else f"{stride[0]},{stride[1]}"
