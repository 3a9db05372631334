"""A case, its providers, and the work that they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

TRAINING = "training step"


class Case(NamedTuple):
    """Work that all providers of a comparison do: the columns of `rows.CASE`. ``tokens`` includes the extra tokens."""

    level: str
    subject: str  # op or model
    device: str
    dtype: str
    batch: int
    tokens: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def __str__(self) -> str:
        return f"{self.subject}-{self.device}-{self.dtype}-{self.batch}x{self.tokens}"


class Work(NamedTuple):
    """Work of one call; None where it is not counted.

    Attributes:
        macs_paper: multiply-accumulates by the paper's count.
        macs_computed: multiply-accumulates of the matrix products that run.
        bytes: smallest number of bytes to read and write.
    """

    macs_paper: int | None = None
    macs_computed: int | None = None
    bytes: int | None = None


class Provider(NamedTuple):
    """An implementation of the work of a case.

    Attributes:
        name: ``"ours"``, ``"timm ViT"``, ...
        call: function without arguments; None if it cannot run, for the reason in ``why_not``.
        check: function of the result of ``call`` that raises `WrongResult`.
        backend: variant of the implementation: ``"cpu"``, ``"compiled"``, ...
        keep_rate: fraction of the patches that each pruning block keeps. 1: unpruned. None: the case has no pruning.
        work: `Work` of a call.
        why_not: the reason why it cannot run.
        part: part of the work, if the row is about one part only.
    """

    name: str
    call: Callable[[], Any] | None
    check: Callable[[Any], None] | None
    backend: str | None = None
    keep_rate: float | None = None
    work: Work = Work()
    why_not: str = ""
    part: str | None = None


def left_out(name: str, why_not: str, **variant: Any) -> Provider:
    """A provider that cannot run on this machine."""
    return Provider(name, None, None, why_not=why_not, **variant)
