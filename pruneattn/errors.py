"""The error that reports a problem to the user."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
