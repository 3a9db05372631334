"""Tables of what kernels take of a GPU, compiled ahead of time: bench/results/{triton,cuda}-resources.csv."""

import csv
from pathlib import Path

from pruneattn.files import atomic_write

#: Shared memory that a block can have on each architecture, bytes. The last is AMD's, by ROCm.
MOST_SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


def write(path, columns, rows):
    with atomic_write(Path(path)) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
    print(path)


def read(path):
    """The rows as dicts of strings."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
