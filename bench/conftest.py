"""The run of the benchmarks: options, peak speeds, result file, and the tables at its end."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from bench.harness import grid
from bench.harness.case import Case
from bench.harness.machine import RESULTS, Peaks, describe_machine, measure_peaks
from bench.harness.measure import measure_case
from bench.harness.report import case_tables
from bench.harness.rows import ResultFile, Row, name_of
from pruneattn import backends

RUN = pytest.StashKey()

#: Number of times that a case is measured, with all other cases in between. The speed of a machine changes over
#: minutes, which the rounds of one visit do not show.
VISITS = 2
#: Seconds; a case whose visit takes longer is measured once.
SHORT_VISIT = 3.0


def pytest_addoption(parser):
    group = parser.getgroup("bench", "pruneattn's benchmarks")
    group.addoption("--bench-full", action="store_true", help="measure the whole grid of sizes; takes hours on a CPU")
    group.addoption("--bench-device", choices=("cpu", "cuda"), help="device (default: cuda if available)")
    group.addoption("--bench-threads", type=int, metavar="N", help="CPU threads (default: PyTorch's)")
    group.addoption("--bench-hot", action="store_true", help="do not clear the L2 cache before each call on CUDA")
    group.addoption("--bench-seconds", type=float, metavar="S", help="skip cases that would start after S seconds")
    group.addoption("--bench-rounds", type=int, metavar="N", help="rounds of timing at all levels")
    group.addoption(
        "--bench-patches",
        type=_numbers,
        metavar="N,..",
        help="numbers of patches of models and blocks; 1212 for the published AST with stride 10",
    )
    group.addoption("--bench-batches", type=_numbers, metavar="N,..", help="clips per call, at all levels")
    group.addoption("--bench-dtypes", type=_dtypes, metavar="DTYPE,..", help="dtypes, at all levels: float32,bfloat16")
    group.addoption(
        "--bench-providers",
        type=lambda text: text.split(","),
        metavar="NAME,..",
        help="measure only providers with these names, for example 'ours,OpenVINO'",
    )
    group.addoption(
        "--bench-output",
        type=Path,
        default=RESULTS,
        metavar="FOLDER",
        help="folder for the result (default: bench/results)",
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _dtypes(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not {"float32", "bfloat16", "float16"}.issuperset(names):
        raise argparse.ArgumentTypeError(f"{text!r}: expected names of float32, bfloat16, float16, joined by commas")
    return names


def device_of(config: pytest.Config) -> str:
    """Device of this run, ``"cpu"`` or ``"cuda"``."""
    return config.getoption("bench_device") or ("cuda" if torch.cuda.is_available() else "cpu")


def grid_of(config: pytest.Config) -> dict[str, grid.Sizes]:
    """`grid.Sizes` of each level in this run."""
    levels = grid.GRIDS[device_of(config), config.getoption("bench_full")]
    given = {name: config.getoption(f"bench_{name}") for name in ("rounds", "batches", "dtypes")}
    changes = {name: value for name, value in given.items() if value}
    # The cases of "precision" contain all dtypes.
    kept = {"dtypes": levels["precision"].dtypes} if "precision" in levels else {}
    levels = {
        level: sizes._replace(**changes | (kept if level == "precision" else {})) for level, sizes in levels.items()
    }
    if patches := config.getoption("bench_patches"):
        levels |= {level: levels[level]._replace(lengths=patches) for level in grid.OF_PATCHES if level in levels}
    return levels


def pytest_generate_tests(metafunc):
    """Parametrize the tests of a file by the grid's cases at the file's ``LEVELS``, and of its ``OP`` if it has one."""
    if "case" in metafunc.fixturenames:
        levels, device, op = grid_of(metafunc.config), device_of(metafunc.config), getattr(metafunc.module, "OP", None)
        here = [level for level in metafunc.module.LEVELS if level in levels]
        metafunc.parametrize(
            "case", [c for level in here for c in grid.cases(level, device, levels[level], op)], ids=str
        )
        metafunc.parametrize("visit", range(VISITS), ids="visit{}".format)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.callspec.params["visit"])


class Run(NamedTuple):
    """State that all measurements of a run share.

    Attributes:
        peaks: peak speeds of the machine.
        result: the result file.
        seen: seconds of the rounds of earlier visits by row key.
        short: tests and cases that are measured again.
        started: start of the run, by the monotonic clock.
    """

    peaks: Peaks
    result: ResultFile
    seen: dict
    short: set
    started: float


@pytest.fixture(scope="session")
def run(request: pytest.FixtureRequest) -> Run:
    started, config, device = time.monotonic(), request.config, device_of(request.config)
    if config.getoption("bench_threads"):
        torch.set_num_threads(config.getoption("bench_threads"))
    dtypes = sorted({dtype for sizes in grid_of(config).values() for dtype in sizes.dtypes} - {"int8"})
    large = {"size": 8192, "copied": 2**30} if device == "cuda" else {}
    peaks = measure_peaks(device, dtypes, **large)
    machine = {**describe_machine(device), "peaks": peaks._asdict()}
    result = ResultFile(config.getoption("bench_output"), "gpu" if device == "cuda" else "cpu", machine)
    config.stash[RUN] = Run(peaks, result, {}, set(), started)
    return config.stash[RUN]


@pytest.fixture
def sizes(request: pytest.FixtureRequest, case: Case) -> grid.Sizes:
    """`grid.Sizes` at the level of the case."""
    return grid_of(request.config)[case.level]


if find_spec("pytest_benchmark") is None:

    class Once:
        """The part of pytest-benchmark's fixture that is used here."""

        def __init__(self):
            self.extra_info = {}

        def pedantic(self, function, rounds):
            return function()

    @pytest.fixture
    def benchmark():
        return Once()


@pytest.fixture
def record(request, benchmark, run: Run, case: Case, visit: int) -> Callable[[Callable[[], list[Row]]], None]:
    """``record(function)`` calls the function, and writes the rows that it returns. Wrong results then fail the test.

    For pytest-benchmark the whole measurement is one call, with the rows as extra info. It does not repeat the call or
    compare times, because only interleaved rounds make the times of a case comparable.
    """
    test = request.node.originalname, case
    if visit and test not in run.short:
        pytest.skip("the first visit was long enough")
    start, limit = time.monotonic(), request.config.getoption("bench_seconds")
    if limit is not None and start - run.started > limit:
        pytest.skip("no time left")

    def record(function: Callable[[], list[Row]]) -> None:
        rows = benchmark.pedantic(function, rounds=1)
        run.result.add(rows)
        benchmark.extra_info["rows"] = rows
        wrong = [f"{name_of(row)}: {row['status']}" for row in rows if row["status"].startswith("wrong")]
        assert not wrong, "\n".join(wrong)
        if time.monotonic() - start < SHORT_VISIT:
            run.short.add(test)

    return record


@pytest.fixture
def measure(request, record, run: Run, sizes: grid.Sizes) -> Callable:
    """``measure(case, providers)`` checks the providers of a case, times them in interleaved rounds and writes rows."""

    def measure(case, providers):
        hot, names = request.config.getoption("bench_hot"), request.config.getoption("bench_providers")
        providers = [provider for provider in providers if not names or provider.name in names]
        record(partial(measure_case, case, providers, run.peaks, sizes.rounds, hot, run.seen))

    return measure


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_group_stats():
    """Disable the table of pytest-benchmark, whose rows would each contain all providers of a case."""
    return []


def pytest_terminal_summary(terminalreporter, config):
    run = config.stash.get(RUN, None)
    if run is not None and run.result.rows:
        terminalreporter.write_line(f"\n{backends()}\n")
        terminalreporter.write_line("\n".join(case_tables(run.result.rows)))
        terminalreporter.write_line(
            f"\nwritten: {run.result.path} and .csv; python -m bench.harness.report writes tables and figures"
        )
