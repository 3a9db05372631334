"""The error and the warning that report a problem to the user."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable

_PACKAGE = __name__.partition(".")[0]


class UserError(ValueError):
    """A value, file or environment from the user cannot be used. The message names it and the remedy."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Error for an unknown name. The message has the most similar known name, and all known names.

    Args:
        kind: kind of thing that the name stands for, such as ``"dataset"``.
        name: the unknown name.
        known: the known names.
    """
    known = list(known)
    near = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return UserError(f"unknown {kind} {name!r}{hint}: choose one of {', '.join(known)}")


def warn_caller(message: str) -> None:
    """Warn, and attribute the warning to the line that called this package."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
