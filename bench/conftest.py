"""The run: its options, its peaks, its result file, and the table at its end."""

import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from bench.harness import grid
from bench.harness.machine import RESULTS, Peaks, describe_machine, measure_peaks
from bench.harness.measure import measure_case
from bench.harness.report import case_tables
from bench.harness.rows import ResultFile, name_of
from pruneattn import backends

RUN = pytest.StashKey()

#: A case is measured so often, with all others in between: a machine has its minutes, which the rounds of one visit do
#: not show. Those that take longer have seen enough of them at the first.
VISITS = 2
SHORT_VISIT = 3.0  # seconds


def pytest_addoption(parser):
    group = parser.getgroup("bench", "pruneattn's benchmarks")
    group.addoption("--bench-full", action="store_true", help="the whole grid of sizes; takes hours on a CPU")
    group.addoption("--bench-device", choices=("cpu", "cuda"), help="(default: cuda if there is one)")
    group.addoption("--bench-threads", type=int, metavar="N", help="threads on the CPU (default: PyTorch's)")
    group.addoption("--bench-hot", action="store_true", help="CUDA: do not clear the L2 cache before each call")
    group.addoption("--bench-seconds", type=float, metavar="S", help="begin no case after so many seconds")
    group.addoption("--bench-rounds", type=int, metavar="N", help="rounds of timing, for all levels")
    group.addoption(
        "--bench-output", type=Path, default=RESULTS, metavar="FOLDER", help="of the result (default: bench/results)"
    )


def device_of(config):
    return config.getoption("bench_device") or ("cuda" if torch.cuda.is_available() else "cpu")


def grid_of(config):
    """The `grid.Sizes` of each level in this run."""
    levels = grid.GRIDS[device_of(config), config.getoption("bench_full")]
    rounds = config.getoption("bench_rounds")
    return {level: sizes._replace(rounds=rounds) for level, sizes in levels.items()} if rounds else levels


def pytest_generate_tests(metafunc):
    """One test for each case that the grid has at the levels of its file."""
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
    """What all measurements of a run share."""

    peaks: Peaks
    result: ResultFile
    seen: dict  # rounds of earlier visits
    short: set  # names of the tests that have further visits
    begun: float


@pytest.fixture(scope="session")
def run(request):
    begun, config, device = time.monotonic(), request.config, device_of(request.config)
    if config.getoption("bench_threads"):
        torch.set_num_threads(config.getoption("bench_threads"))
    dtypes = sorted({dtype for sizes in grid_of(config).values() for dtype in sizes.dtypes})
    large = {"size": 8192, "copied": 2**30} if device == "cuda" else {}
    peaks = measure_peaks(device, dtypes, **large)
    machine = {**describe_machine(device), "peaks": peaks._asdict()}
    result = ResultFile(config.getoption("bench_output"), "gpu" if device == "cuda" else "cpu", machine)
    config.stash[RUN] = Run(peaks, result, {}, set(), begun)
    return config.stash[RUN]


@pytest.fixture
def sizes(request, case):
    """The grid's `Sizes` at the level of the case."""
    return grid_of(request.config)[case.level]


if find_spec("pytest_benchmark") is None:

    class Once:
        """As much of pytest-benchmark as is used here."""

        def __init__(self):
            self.extra_info = {}

        def pedantic(self, function, rounds):
            return function()

    @pytest.fixture
    def benchmark():
        return Once()


@pytest.fixture
def record(request, benchmark, run, case, visit):
    """``record(measure)`` calls the function for its rows and writes them; a wrong result fails the test at its end.

    pytest-benchmark neither repeats nor compares here, since only turns make the times of a case comparable: it gets
    the whole measurement as one call, and the rows as its extra info.
    """

    test = request.node.originalname, case
    if visit and test not in run.short:
        pytest.skip("the first visit was long enough")
    start, limit = time.monotonic(), request.config.getoption("bench_seconds")
    if limit is not None and start - run.begun > limit:
        pytest.skip("no time left")

    def record(measure):
        rows = benchmark.pedantic(measure, rounds=1)
        run.result.add(rows)
        benchmark.extra_info["rows"] = rows
        wrong = [f"{name_of(row)}: {row['status']}" for row in rows if row["status"].startswith("wrong")]
        assert not wrong, "\n".join(wrong)
        if time.monotonic() - start < SHORT_VISIT:
            run.short.add(test)

    return record


@pytest.fixture
def side_by_side(request, record, run, sizes):
    """``side_by_side(case, providers)`` checks the providers of a case, times them in turns and records the rows."""

    def side_by_side(case, providers):
        hot = request.config.getoption("bench_hot")
        record(partial(measure_case, case, providers, run.peaks, sizes.rounds, hot, run.seen))

    return side_by_side


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_group_stats():
    """No table of pytest-benchmark: a row of it would be all providers of a case together."""
    return []


def pytest_terminal_summary(terminalreporter, config):
    run = config.stash.get(RUN, None)
    if run is not None and run.result.rows:
        terminalreporter.write_line(f"\n{backends()}\n")
        terminalreporter.write_line("\n".join(case_tables(run.result.rows)))
        terminalreporter.write_line(f"\nwritten: {run.result.path} and .csv; python -m bench.harness.report draws it")
