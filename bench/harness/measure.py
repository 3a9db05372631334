"""Measurement of a case: checks its providers, times them in interleaved rounds, and returns rows of the schema."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from bench.harness.case import TRAINING, Case, Provider
from bench.harness.cuda_clock import rounds_by_events
from bench.harness.guards import WrongResult
from bench.harness.machine import Peaks
from bench.harness.memory import peak_growth
from bench.harness.rows import Row, key_of, row_of
from pruneattn.runtime.timing import interleaved_rounds


def measure_case(
    case: Case,
    providers: Sequence[Provider],
    peaks: Peaks,
    rounds: int,
    hot: bool = False,
    seen: dict[tuple, list[float]] | None = None,
) -> list[Row]:
    """Check and time the providers of a case. Providers with a wrong result are not timed; their status is the reason.

    Args:
        case: the case.
        providers: its providers.
        peaks: peak speeds of this run.
        rounds: number of rounds.
        hot: on CUDA, do not clear the L2 cache before each call.
        seen: seconds of the rounds of earlier visits by row key. They count too; this visit adds its own.

    Returns:
        A row for each provider, in their order.
    """
    with nullcontext() if case.level == TRAINING else torch.inference_mode():
        status = [_checked(provider) for provider in providers]
        calls = {i: provider.call for i, provider in enumerate(providers) if provider.call and status[i] == "ok"}
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


def _checked(provider: Provider) -> str:
    """Call a provider, check its result and return its status."""
    if provider.call is None or provider.check is None:
        return f"left out: {provider.why_not}"
    try:
        provider.check(provider.call())
    except WrongResult as error:
        return f"wrong: {error}"
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return "out of memory"
    return "ok"


def _clock(
    case: Case, calls: Mapping[int, Callable[[], Any]], rounds: int, hot: bool
) -> tuple[dict[int, list[float]], dict[int, str]]:
    if case.device == "cuda":
        return rounds_by_events(calls, rounds, hot, graphs=case.level in ("op", "block"))
    return interleaved_rounds(calls, case.device, rounds, called_before=True), dict.fromkeys(
        calls, "wall clock, hot caches"
    )


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """The columns of the 20th, 50th and 80th percentile."""
    return dict(zip(("p20_ms", "p50_ms", "p80_ms"), np.quantile(np.array(seconds) * 1e3, (0.2, 0.5, 0.8)).tolist()))


def with_savings(rows: list[Row]) -> list[Row]:
    """Fill ``saving``, ``theory`` and ``realised`` in the rows of a case that prune. Return the same list."""
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
