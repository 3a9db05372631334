"""Checks, rounds, lower bounds, savings and result files. No test depends on the speed of the machine."""

import csv
import json
import sys
import time

import pytest
import torch

from bench.harness.case import TRAINING, Case, Provider, Work, left_out
from bench.harness.guards import WrongResult
from bench.harness.machine import Peaks, describe_machine, measure_peaks
from bench.harness.measure import measure_case, with_savings
from bench.harness.memory import peak_growth
from bench.harness.rows import COLUMNS, SCHEMA, ResultFile, key_of, name_of, read_result, row_of
from pruneattn.errors import UserError

CASE = Case("op", "it", "cpu", "float32", 4, 9)


def wrong(result):
    raise WrongResult("not the reference's")


def sound(result):
    pass


@pytest.fixture
def clock(monkeypatch):
    """``clock(seconds)`` is a call that takes this long by a clock that only such calls advance."""
    now = [0.0]

    def make(seconds):
        def call():
            now[0] += seconds

        return call

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return make


def test_rows(clock, peaks):
    work = Work(macs_paper=2_000_000, macs_computed=1_000_000, bytes=500_000)
    dense_work = work._replace(macs_paper=4_000_000)
    dense = Provider("ours", clock(0.2), sound, "eager", 1.0, dense_work)
    pruned = Provider("ours", clock(0.1), sound, "eager", 0.5, work)
    slow = Provider("peer", clock(0.4), sound, "eager", 1.0, dense_work)
    rows = measure_case(CASE, [slow, pruned, dense], peaks, 3)
    assert [list(row) for row in rows] == [list(COLUMNS)] * 3
    assert [row["p50_ms"] for row in rows] == pytest.approx([400, 100, 200])
    assert [row["clips_per_second"] for row in rows] == pytest.approx([10, 40, 20])
    # 1e6 MACs at 1e11 FLOP/s take 0.02 ms, 5e5 bytes at 1e10 B/s 0.05 ms.
    assert rows[1]["floor_ms"] == pytest.approx(0.05) and rows[1]["floor_share"] == pytest.approx(0.0005)
    # Relative to the fastest unpruned provider, not to the first provider.
    assert rows[1]["saving"] == pytest.approx(0.5) and rows[1]["theory"] == 0.5
    assert rows[1]["realised"] == pytest.approx(1.0)
    assert rows[0]["saving"] is None and rows[2]["realised"] is None


def test_rounds_of_all_visits_count(clock, peaks):
    seen = {}
    for milliseconds in (100, 300, 200):
        rows = measure_case(CASE, [Provider("ours", clock(milliseconds / 1e3), sound)], peaks, 2, seen=seen)
    assert rows[0]["rounds"] == 6 and rows[0]["p50_ms"] == pytest.approx(200)
    assert (rows[0]["p20_ms"], rows[0]["p80_ms"]) == pytest.approx((100, 300))


def test_savings():
    def row(rate, ms, macs):
        return row_of(keep_rate=rate, p50_ms=ms, macs_paper=macs)

    assert with_savings([row(1.0, 2, 8), row(0.5, 3, 4)])[1]["realised"] == pytest.approx(-1.0)
    assert with_savings([row(0.5, 3, 4), row(None, 1, 8)])[0]["saving"] is None  # no dense provider
    assert with_savings([row(1.0, None, 8), row(0.5, 3, 4)])[1]["saving"] is None  # not timed
    assert with_savings([row(1.0, 2, 8), row(0.9, 1, 8)])[1]["realised"] is None  # nothing to save


def test_wrong_providers_are_not_timed(peaks):
    calls = []
    providers = [
        Provider("ours", lambda: calls.append("ours"), sound),
        Provider("liar", lambda: calls.append("liar"), wrong),
        left_out("absent", "it is not installed"),
    ]
    rows = measure_case(CASE, providers, peaks, 1)
    assert [row["status"] for row in rows] == ["ok", "wrong: not the reference's", "left out: it is not installed"]
    assert calls.count("liar") == 1 and rows[1]["p50_ms"] is None and rows[2]["p50_ms"] is None
    assert rows[0]["p50_ms"] > 0


def test_other_providers_run_after_one_that_runs_out_of_memory(peaks):
    def greedy():
        raise torch.OutOfMemoryError("CUDA out of memory")

    rows = measure_case(CASE, [Provider("greedy", greedy, sound), Provider("ours", lambda: None, sound)], peaks, 1)
    assert [row["status"] for row in rows] == ["out of memory", "ok"]


def test_only_training_steps_run_with_gradients(peaks):
    seen = []
    provider = [Provider("it", lambda: seen.append(torch.is_inference_mode_enabled()), sound)]
    measure_case(CASE, provider, peaks, 1)
    assert set(seen) == {True}
    seen.clear()
    measure_case(CASE._replace(level=TRAINING), provider, peaks, 1)
    assert set(seen) == {False}


def test_floor():
    peaks = Peaks(copy=100.0, product={"float32": 1000.0})
    assert peaks.floor_ms("float32", Work(None, 1000, None)) == pytest.approx(2000)  # two FLOP each
    assert peaks.floor_ms("float32", Work(None, 1000, 500)) == pytest.approx(5000)
    assert peaks.floor_ms("bfloat16", Work(None, 1000, 100)) == pytest.approx(1000)  # no peak of this dtype
    assert peaks.floor_ms("float32", Work()) is None


def test_peaks_are_those_of_the_fastest_round(monkeypatch):
    monkeypatch.setattr(
        "bench.harness.machine.timing.interleaved_rounds", lambda *_: {"copy": [4.0, 2.0], "float32": [1.0, 9.0]}
    )
    peaks = measure_peaks("cpu", ["float32"], size=10, copied=100)
    assert peaks == Peaks(copy=100.0, product={"float32": 2000.0})


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_growth():
    """Memory that the call frees counts. It counts again in a second call, although the allocator has kept it."""
    for _ in range(2):
        assert 63 < peak_growth(lambda: torch.ones(16 * 2**20).sum(), "cpu") < 96
        assert 31 < peak_growth(lambda: [torch.ones(2**13) for _ in range(2**10)], "cpu") < 64
    assert peak_growth(lambda: None, "cpu") < 8


def test_result_file(tmp_path):
    machine = {**describe_machine("cpu"), "peaks": {"copy": 1.0}}
    rows = [row_of(**CASE._asdict(), provider="ours", keep_rate=0.5, status="ok", p50_ms=1.5)]
    file = ResultFile(tmp_path / "new", "cpu", machine)
    file.add([{**rows[0], "p50_ms": 7.0}, {**rows[0], "keep_rate": 1.0}])
    file.add(rows)  # replaces the first row
    rows.append({**rows[0], "keep_rate": 1.0, "p50_ms": 1.5})
    assert file.path.name.startswith("cpu-20") and file.path.suffix == ".json"
    assert read_result(file.path) == (json.loads(json.dumps(machine)), rows)
    with open(file.path.with_suffix(".csv"), newline="") as csv_file:
        table = list(csv.DictReader(csv_file))
    assert len(table) == 2 and table[0]["schema"] == str(SCHEMA)
    assert table[0]["p50_ms"] == "1.5" and table[0]["torch"] == torch.__version__ and table[0]["saving"] == ""
    # The device of the case and the name of the device are separate columns.
    assert table[0]["device"] == "cpu" and table[0]["device_name"] == machine["device_name"]
    assert {"driver", "clocks_mhz", "torch", "triton", "commit", "changed_files", "threads", "date"} <= machine.keys()
    assert not machine.keys() & set(COLUMNS)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not a result"),
        ("[]", "not a result"),
        ('{"tables": []}', "not a result"),
        ('{"schema": 99, "machine": {}, "rows": []}', "has schema 99"),
        ('{"schema": 1, "machine": {}, "rows": []}', "has no rows"),
        ('{"schema": 1, "machine": {}, "rows": [{"level": "op"}]}', "other columns"),
    ],
)
def test_other_files_are_rejected(tmp_path, content, message):
    path = tmp_path / "it.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_result(path)


def test_missing_files_and_folders_are_errors(tmp_path):
    with pytest.raises(UserError, match="nowhere.json: No such file"):
        read_result(tmp_path / "nowhere.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--bench-output"):
        ResultFile(tmp_path / "file" / "below", "cpu", {"date": "2026-01-01T00:00:00"}).add([row_of()])


def test_row_names():
    row = row_of(**CASE._asdict(), provider="ours", backend="cpu", keep_rate=0.5)
    assert name_of(row) == "ours, cpu, 0.5"
    assert key_of(row) == (*CASE, "ours", "cpu", 0.5, None)
    with pytest.raises(TypeError, match="no such columns: speed"):
        row_of(speed=1)
