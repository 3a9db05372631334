"""Tables of the GPU resources of kernels, compiled ahead of time: bench/results/{triton,cuda}-resources.csv."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from pruneattn.files import atomic_write

#: Bytes of shared memory that a block can have on each architecture. gfx942 is an AMD GPU, compiled by ROCm.
MOST_SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


def write(path: str | Path, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Write a table as CSV, atomically, and print its path."""
    with atomic_write(Path(path)) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
    print(path)


def read(path: str | Path) -> list[dict[str, str]]:
    """Read a table as dicts of strings."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
