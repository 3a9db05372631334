"""One case: its providers checked, then timed in turns, as rows of the schema."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch

from bench.harness.cuda_clock import rounds_by_events
from bench.harness.guards import WrongResult
from bench.harness.memory import peak_growth
from bench.harness.rows import key_of, row_of
from pruneattn.runtime.timing import rounds_side_by_side

TRAINING = "training step"


class Case(NamedTuple):
    """What all providers of a comparison do: the columns of `rows.CASE`. ``tokens`` counts extra tokens too."""

    level: str
    subject: str  # op or model
    device: str
    dtype: str
    batch: int
    tokens: int

    @property
    def torch_dtype(self):
        return getattr(torch, self.dtype)

    def __str__(self):
        return f"{self.subject}-{self.device}-{self.dtype}-{self.batch}x{self.tokens}"


class Work(NamedTuple):
    """What one call has to do; None where it is not counted."""

    macs_paper: int | None = None
    macs_computed: int | None = None
    bytes: int | None = None


class Provider(NamedTuple):
    """One way to do the work of a case.

    Attributes:
        name: who: "ours", "timm ViT", ...
        call: function without arguments; None if it cannot run, for the reason in ``why_not``.
        check: function of what ``call`` returns that raises `WrongResult`.
        backend: how, where there are several ways: "cpu", "compiled", ...
        keep_rate: share of the patches that each pruning block keeps; 1 is unpruned, None has no such thing.
        work: `Work`.
        part: of the work, where a row is about a part alone.
    """

    name: str
    call: Callable | None
    check: Callable
    backend: str | None = None
    keep_rate: float | None = None
    work: Work = Work()
    why_not: str = ""
    part: str | None = None


def left_out(name, why_not, **variant):
    """A provider that cannot run here."""
    return Provider(name, None, None, why_not=why_not, **variant)


def measure_case(case, providers, peaks, rounds, hot=False, seen=None):
    """Rows of the providers, in their order. A provider whose result is wrong is not timed; its row says so.

    Args:
        case: `Case`.
        providers: list of `Provider`.
        peaks: `machine.Peaks` of this run.
        rounds: of timing.
        hot: on CUDA, do not clear the L2 cache before each call.
        seen: dict of the rounds of earlier visits, which count as well; those of this one are added.
    """
    with nullcontext() if case.level == TRAINING else torch.inference_mode():
        status = [_checked(provider) for provider in providers]
        calls = {i: provider.call for i, provider in enumerate(providers) if status[i] == "ok"}
        memory = {i: peak_growth(call, case.device) for i, call in calls.items()}
        seconds, timing = _clock(case, calls, rounds, hot)
    seen = {} if seen is None else seen
    rows = []
    for i, provider in enumerate(providers):
        row = row_of(
            **case._asdict(),
            **provider.work._asdict(),
            provider=provider.name,
            backend=provider.backend,
            keep_rate=provider.keep_rate,
            part=provider.part,
            status=status[i],
        )
        if i in seconds:
            samples = seen.setdefault(key_of(row), [])
            samples += seconds[i]
            row |= percentiles(samples)
            row |= {"timing": timing[i], "rounds": len(samples), "peak_memory_mib": memory[i]}
            row["clips_per_second"] = 1e3 * case.batch / row["p50_ms"]
            row["floor_ms"] = peaks.floor_ms(case.dtype, provider.work)
            row["floor_share"] = row["floor_ms"] and row["floor_ms"] / row["p50_ms"]
        rows.append(row)
    return with_savings(rows)


def _checked(provider):
    """The provider's status."""
    if provider.call is None:
        return f"left out: {provider.why_not}"
    try:
        provider.check(provider.call())
    except WrongResult as error:
        return f"wrong: {error}"
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return "out of memory"
    return "ok"


def _clock(case, calls, rounds, hot):
    if case.device == "cuda":
        return rounds_by_events(calls, rounds, hot, graphs=case.level in ("op", "block"))
    return rounds_side_by_side(calls, case.device, rounds, called_before=True), dict.fromkeys(
        calls, "wall clock, hot caches"
    )


def percentiles(seconds):
    """Columns of the 20th, 50th and 80th percentile."""
    return dict(zip(("p20_ms", "p50_ms", "p80_ms"), np.quantile(np.array(seconds) * 1e3, (0.2, 0.5, 0.8)).tolist()))


def with_savings(rows):
    """The rows of a case with ``saving``, ``theory`` and ``realised`` where something was pruned."""
    dense = [row for row in rows if row["keep_rate"] == 1 and row["p50_ms"] is not None and row["macs_paper"]]
    if not dense:
        return rows
    fastest = min(row["p50_ms"] for row in dense)
    for row in rows:
        if row["keep_rate"] not in (None, 1) and row["p50_ms"] is not None and row["macs_paper"]:
            row["saving"] = 1 - row["p50_ms"] / fastest
            row["theory"] = 1 - row["macs_paper"] / dense[0]["macs_paper"]
            row["realised"] = row["saving"] / row["theory"] if row["theory"] > 0 else None
    return rows
