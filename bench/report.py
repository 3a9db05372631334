"""Times of several variants as rows of tables: what the sections of a CPU run are made of.

A section is a generator ``section(settings)`` of tables ``(title, rows)``, whose rows are flat dicts of the same keys.
"""

import sys
from typing import NamedTuple

import numpy as np
import torch

from pruneattn.timing import rounds_side_by_side


class Settings(NamedTuple):
    """What is measured. The defaults are what results are published of."""

    rounds: int = 5  # of whole models
    size: str = "base"
    frames: int = 1024
    batch: int = 4
    keep_rates: tuple = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
    peer_keep_rates: tuple = (1.0, 0.7, 0.5)
    tokens: tuple = (65, 257, 513)
    batches: tuple = (1, 8)
    heads: int = 12
    dtypes: tuple = (torch.float32, torch.bfloat16)

    @property
    def op_rounds(self):
        """Rounds of single ops and blocks, which are short."""
        return 3 * self.rounds


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def label_text(label):
    return ", ".join(f"{name} {value}" for name, value in label.items())


def progress(text):
    """Say what is being done; the tables alone go to the standard output."""
    print(text, file=sys.stderr, flush=True)


def measure(what, variants, rounds):
    """Time functions side by side, without gradients: dict of name -> 20th, 50th and 80th percentile in ms."""
    progress(f"timing {what}: {len(variants)} variants, {rounds} rounds")
    with torch.inference_mode():
        seconds = rounds_side_by_side(variants, "cpu", rounds)
    return {name: percentiles(values) for name, values in seconds.items()}


def percentiles(seconds):
    return dict(zip(("p20_ms", "p50_ms", "p80_ms"), np.quantile(np.array(seconds) * 1e3, (0.2, 0.5, 0.8)).tolist()))


def saving_rows(label, times, macs):
    """A row per variant: what it saves of the fastest dense one, beside what it saves of the multiply-accumulates.

    ``times``: of `measure`, by ``(what, keep-rate)``. ``macs(keep_rate)``: multiply-accumulates as the paper counts.
    """
    dense = min(time["p50_ms"] for (_, keep_rate), time in times.items() if keep_rate == 1)
    rows = []
    for (what, keep_rate), time in times.items():
        saving, theory = 1 - time["p50_ms"] / dense, 1 - macs(keep_rate) / macs(1.0)
        realised = saving / theory if theory else None
        rows.append(
            {**label, "what": what, "keep_rate": keep_rate, "gmacs": macs(keep_rate) / 1e9, **time, "saving": saving,
             "theory": theory, "realised": realised}
        )  # fmt: skip
    return rows


def markdown(rows):
    """A Markdown table of the rows."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(value):
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)
