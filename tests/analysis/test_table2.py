import csv
import json
import math

import pytest
import torch

from pruneattn.analysis import table2
from pruneattn.analysis.commands import table2 as command
from pruneattn.analysis.table2 import (
    PRINTED_GMACS,
    Timings,
    cell_options,
    count_rows,
    plot_table2,
    speed_rows,
    table_lines,
    time_cell,
)
from pruneattn.errors import UserError
from pruneattn.runtime.timing import Speed

RATES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
EXTRA_TOKENS = {"audiomae_base": 1, "ast_base": 2}


def count_by_definition(patches, extra, keep_rate, dim=768):
    """The paper's count: patch embedding, and per block ``4 n C^2 + 2 n^2 C + 8 m C^2``."""
    macs, left = patches * 256 * dim, patches
    for block in range(12):
        tokens = left + extra
        if block in (3, 6, 9):
            left = math.ceil(round(keep_rate * left, 9))
        macs += 4 * tokens * dim**2 + 2 * tokens**2 * dim + 8 * (left + extra) * dim**2
    return macs / 1e9


@pytest.mark.parametrize("frames", [128, 512, 1024])
@pytest.mark.parametrize("name", EXTRA_TOKENS)
def test_the_papers_table(name, frames):
    rows = count_rows(name, frames, RATES)
    assert [row["keep_rate"] for row in rows] == list(RATES)
    dense = count_by_definition(frames // 2, EXTRA_TOKENS[name], 1.0)
    differences = []
    for row in rows:
        count = count_by_definition(frames // 2, EXTRA_TOKENS[name], row["keep_rate"])
        assert row["patches"] == frames // 2 and row["gmacs_paper"] == pytest.approx(count)
        assert row["theory"] == pytest.approx(1 - count / dense)
        assert row["difference"] == pytest.approx(count - row["gmacs_printed"])
        differences.append(abs(row["difference"]))
    # The table was counted with one extra token; AST's second extra token adds up to 0.1.
    assert max(differences) < (0.1 if name == "audiomae_base" else 0.2)
    computed = [row["gmacs_computed"] for row in rows]
    head = 768 * 527 / 1e9
    assert computed[0] == pytest.approx(dense + head)
    assert all(ours < row["gmacs_paper"] + head for ours, row in zip(computed[1:], rows[1:]))


def test_cells_as_printed():
    cells = {(128, 1.0): 5.6, (128, 0.4): 2.5, (512, 0.9): 20.0, (512, 0.5): 11.4, (1024, 0.7): 31.1, (1024, 0.6): 27.1}
    assert {cell: PRINTED_GMACS[cell[0]][cell[1]] for cell in cells} == cells


def test_cells_that_the_paper_does_not_print_have_no_difference():
    for name, frames, rate in (("audiomae_tiny", 128, 0.5), ("ast_base", 256, 0.5), ("ast_base", 128, 0.55)):
        (row,) = count_rows(name, frames, [rate])
        assert row["gmacs_printed"] is None and row["difference"] is None and row["gmacs_paper"] > 0


@pytest.mark.parametrize("frames, stride, patches", [(1024, 10, 12 * 101), (1031, (10, 16), 12 * 64), (100, 16, 48)])
def test_counts_of_other_grids(frames, stride, patches):
    """The published AST has 1212 patches. The paper prints no cell of these."""
    rows = count_rows("ast_base", frames, [1.0, 0.5], stride)
    for row in rows:
        assert row["patches"] == patches and row["gmacs_printed"] is None
        assert row["gmacs_paper"] == pytest.approx(count_by_definition(patches, 2, row["keep_rate"]))
    assert [row.get("stride") for row in rows] == [{10: "10", (10, 16): "10,16", 16: None}[stride]] * 2
    with pytest.raises(UserError, match="stride: audiomae_base has a patch every 16"):
        count_rows("audiomae_base", frames, [1.0], (10, 10))


def test_the_stride_belongs_to_the_options_of_a_time(monkeypatch, tmp_path):
    how = {"batch_size": 1, "amp": "fp32", "rounds": 1, "compiled": False}
    usual, strided = (cell_options("ast_tiny", 64, [0.5], "here", **how, stride=stride) for stride in (16, 10))
    assert usual == cell_options("ast_tiny", 64, [0.5], "here", **how, stride=(16, 16)) and "stride" not in usual
    models = []
    monkeypatch.setattr(table2, "measure_speed", lambda model, *arguments, **how: models.append(model))
    for options in (usual, strided):
        Timings(tmp_path / "timings.json").add(options, Speed({0.5: {"eager": [1.0]}}))
        time_cell(json.loads(json.dumps(options)), torch.device("cpu"))
    assert [model.num_patches for model in models] == [32, 12 * 5]
    assert Timings(tmp_path / "timings.json").find(strided) is not None
    row = count_rows("ast_tiny", 64, [0.5], 10)[0]
    speed = Speed({rate: {"eager": [0.01]} for rate in (1.0, 0.5)})
    assert speed_rows([row], speed, strided)[0]["stride"] == "10"


def test_measured_time_is_added_to_the_counts():
    rows = count_rows("audiomae_base", 128, [1.0, 0.5])
    speed = Speed({1.0: {"optimized": [0.02, 0.02, 0.03], "eager, SDPA": [0.01] * 3}, 0.5: {"optimized": [0.004] * 3}})
    how = {"model": "audiomae_base", "frames": 128, "keep_rates": [1.0, 0.5], "batch_size": 8, "torch": "2.x"}
    dense, half = speed_rows(rows, speed, how)
    assert dense["saving"] == 0 and dense["realised"] is None and dense["ms_per_clip"] == pytest.approx(10)
    assert half["saving"] == pytest.approx(0.6) and half["realised"] == pytest.approx(0.6 / half["theory"])
    assert half["dense"] == "eager, SDPA" and half["batch_size"] == 8 and half["torch"] == "2.x"
    assert half["gmacs_printed"] == 2.8 and "keep_rates" not in half
    assert list(dense) == list(half)  # a CSV has one header
    text = table_lines([dense, half])
    assert len(text) == 4 and len(set(map(len, text))) == 1
    assert [cell.strip() for cell in text[3].split("|")[1:-1]] == [
        "audiomae_base",
        "64",
        "0.5",
        "2.8",
        "2.81",
        "+0.01",
        "2.78",
        "4.00",
        "4.00",
        "4.00",
        "60.0%",
        "49.9%",
        "120%",
    ]


def test_timings_are_found_by_their_options(tmp_path):
    path = tmp_path / "timings.json"
    assert Timings(path).find({"rounds": 3}) is None
    Timings(path).add({"rounds": 3}, Speed({1.0: {"eager": [1.0]}}))
    later = Timings(path)
    later.add({"rounds": 4}, Speed({1.0: {"eager": [2.0]}, 0.5: {"eager": [1.5]}}))
    assert Timings(path).find({"rounds": 3}) == Speed({1.0: {"eager": [1.0]}})
    assert Timings(path).find({"rounds": 4}).seconds[0.5] == {"eager": [1.5]}
    assert Timings(path).find({"rounds": 5}) is None


@pytest.mark.parametrize("content", ["", "3", '{"a": 1}', "[1]", '[{"options": {}}]', '[{"options": 1, "seconds": 1}]'])
def test_other_files_are_rejected(tmp_path, content):
    path = tmp_path / "timings.json"
    path.write_text(content)
    with pytest.raises(
        UserError, match=r"timings\.json is not a timings\.json of pruneattn analyze table2 .* delete it"
    ):
        Timings(path)


# The command, and drawing -----------------------------------------------------------------------------------------


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def measured(monkeypatch):
    """Calls of ``measure_speed``, which is replaced: the time is proportional to the keep-rate."""
    calls = []

    def fake(model, keep_rates, device, **how):
        calls.append((model.name, model.frames))
        assert not model.training
        return Speed({rate: {"eager": [0.02 * rate] * how["rounds"]} for rate in (1.0, *keep_rates)})

    monkeypatch.setattr(table2, "measure_speed", fake)
    return calls


SMALL = ("--model", "audiomae_tiny", "--frames", "32", "64")
SWEEP = ("--keep-rates", "1", "0.5")


def call(output, *options, sweep=SWEEP):
    pytest.importorskip("matplotlib")
    assert command.main([*SMALL, *sweep, "--device", "cpu", "--output", str(output), *map(str, options)]) == 0


def run(output, *options, sweep=SWEEP):
    call(output, *options, sweep=sweep)
    return read_csv(output / "table2.csv")


def test_a_stopped_run_resumes(tmp_path, measured, monkeypatch, capsys):
    complete = table2.measure_speed

    def stopped(model, *arguments, **how):
        if len(measured) == 1:
            raise KeyboardInterrupt
        return complete(model, *arguments, **how)

    monkeypatch.setattr(table2, "measure_speed", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "--rounds", 2)
    assert measured == [("audiomae_tiny", 32)] and not (tmp_path / "table2.csv").exists()

    # The table reads the times from the file.
    path = tmp_path / "timings.json"
    (entry,) = json.loads(path.read_text())
    entry["seconds"]["0.5"]["eager"] = [0.004, 0.006]
    path.write_text(json.dumps([entry]))
    monkeypatch.setattr(table2, "measure_speed", complete)
    measured.clear()
    rows = run(tmp_path, "--rounds", 2)
    assert measured == [("audiomae_tiny", 64)]
    assert [(row["frames"], row["keep_rate"]) for row in rows] == [
        ("32", "1.0"),
        ("32", "0.5"),
        ("64", "1.0"),
        ("64", "0.5"),
    ]
    assert [float(row["saving"]) for row in rows] == pytest.approx([0, 0.75, 0, 0.5])
    assert float(rows[1]["ms_per_clip"]) == pytest.approx(5) and rows[1]["rounds"] == "2"
    assert float(rows[1]["ms_per_clip_p20"]) == pytest.approx(4.4)
    assert "[1/2] audiomae_tiny, 16 patches: measured before" in capsys.readouterr().out


def test_each_option_has_its_own_times(tmp_path, measured, monkeypatch):
    monkeypatch.setattr(command, "save_result", lambda *_: None)  # no drawing
    monkeypatch.setattr(command, "plot_table2", lambda _: None)
    one = ("--model", "ast_tiny", "--frames", 32)
    others = (
        [],
        ["--rounds", 3],
        ["--batch-size", 3],
        ["--amp", "bf16"],
        ["--compile"],
        ["--keep-rates", 0.5],
        ["--frames", 48],
        ["--stride", "10"],
        ["--stride", "10,16"],
        ["--model", "audiomae_tiny"],
    )
    for count, options in enumerate(others, 1):
        for _ in range(2):  # the second time finds the first
            call(tmp_path, *one, *options)
            assert len(measured) == count
    for variable in ("PRUNEATTN_BACKEND", "PRUNEATTN_CPU_ISA"):
        count = len(measured)
        monkeypatch.setenv(variable, "reference")
        call(tmp_path, *one)
        assert len(measured) == count + 1


def test_the_command_counts_other_strides(tmp_path, measured):
    rows = run(tmp_path, "--model", "ast_base", "--frames", 1024, "--stride", "10", "--rounds", 0)
    assert [(row["stride"], row["patches"], row["gmacs_printed"]) for row in rows] == [("10", "1212", "")] * 2
    assert float(rows[1]["gmacs_paper"]) == pytest.approx(count_by_definition(1212, 2, 0.5))


def test_without_timing(tmp_path, measured):
    rows = run(tmp_path, "--rounds", 0)
    assert measured == [] and not (tmp_path / "timings.json").exists()
    assert list(rows[0]) == [
        "model",
        "frames",
        "patches",
        "keep_rate",
        "gmacs_printed",
        "gmacs_paper",
        "difference",
        "gmacs_computed",
        "theory",
    ]
    assert len(rows) == 4 and rows[0]["gmacs_printed"] == ""
    assert (tmp_path / "table2.pdf").read_bytes().startswith(b"%PDF")


def test_several_values_of_keep_rate_are_a_deprecated_sweep(tmp_path, capsys):
    """Three values are a sweep, too, although the models have three pruning blocks."""
    rates = ("0.7", "0.5", "0.3")
    old = run(tmp_path / "old", "--rounds", 0, sweep=("--keep-rate", *rates))
    warning = "warning: --keep-rate with several values is deprecated: use --keep-rates 0.7 0.5 0.3\n"
    assert capsys.readouterr().err == warning
    assert old == run(tmp_path / "new", "--rounds", 0, sweep=("--keep-rates", *rates))
    assert [row["keep_rate"] for row in old] == [*rates, *rates] and capsys.readouterr().err == ""


def test_one_value_of_keep_rate_is_the_only_row(tmp_path, capsys):
    rows = run(tmp_path, "--frames", 32, "--rounds", 0, sweep=("--keep-rate", "0.7"))
    assert [row["keep_rate"] for row in rows] == ["0.7"] and capsys.readouterr().err == ""
    with pytest.raises(UserError, match="--keep-rate 0.7,0.5,0.3: all pruning blocks share a keep-rate"):
        run(tmp_path, "--rounds", 0, sweep=("--keep-rate", "0.7,0.5,0.3"))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "audiomae_huge"], "audiomae_huge"),
        (["--frames", "12"], "frames: must be at least 16"),
        (["--stride", "10"], "stride: audiomae_tiny has a patch every 16"),
        (["--keep-rates", "0.5", "1.5"], "keep_rate: .* got 1.5"),
        (["--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["--rounds", "-1"], "--rounds -1: must be at least 0"),
        (["--device", "gpu"], "--device gpu"),
    ],
)
def test_invalid_options_are_rejected_before_the_work(tmp_path, measured, options, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "out", *options)
    assert measured == [] and not (tmp_path / "out").exists()


def test_the_command_measures_time(tmp_path):
    """A real measurement at the smallest size. A keep-rate of 1 is timed even if it is not in the table."""
    options = ("--model", "ast_tiny", "--frames", 32, "--batch-size", 1, "--rounds", 1)
    rows = run(tmp_path, *options, sweep=("--keep-rate", "0.25"))
    (row,) = rows
    assert float(row["ms_per_clip"]) > 0 and float(row["saving"]) < 1 and float(row["theory"]) > 0.3
    assert float(row["realised"]) == pytest.approx(float(row["saving"]) / float(row["theory"]))
    (entry,) = json.loads((tmp_path / "timings.json").read_text())
    assert set(entry["seconds"]) == {"1.0", "0.25"} and "eager, SDPA" in entry["seconds"]["1.0"]
    assert "threads" in row["device"] and row["batch_size"] == "1"


def test_figure():
    pytest.importorskip("matplotlib")
    speed = Speed({1.0: {"eager": [0.010] * 6}, 0.5: {"eager": [0.001, 0.002, 0.003, 0.004, 0.005, 0.006]}})
    how = {"compiled": False, "device": "here", "torch": "2", "amp": "fp32", "batch_size": 8, "rounds": 6}
    rows = [
        row
        for model in ("audiomae_base", "audiomae_tiny")
        for frames in (512, 128)
        for row in speed_rows(count_rows(model, frames, [1.0, 0.5]), speed, how)
    ]
    figure = plot_table2(rows)
    counts, saving, tiny, _ = figure.axes[:4]
    paper, computed, printed = (line.get_xydata().tolist() for line in counts.lines[:3])  # 64 patches come first
    assert [x for x, _ in paper] == [0.5, 1.0]
    assert paper[0][1] == pytest.approx(count_by_definition(64, 1, 0.5)) and computed[0][1] < paper[0][1]
    assert printed == [[0.5, 2.8], [1.0, 5.6]] and counts.lines[2].get_markerfacecolor() == "none"
    assert counts.lines[0].get_linestyle() == "-" and counts.lines[1].get_linestyle() == "--"
    assert len(counts.lines) == 6 and len(tiny.lines) == 4  # the paper prints no cell of the tiny model
    (line,) = (line for line in saving.lines if line.get_label() == "if time followed the MACs")
    assert all(x == y for x, y in line.get_xydata())
    theory = 100 * (1 - count_by_definition(64, 1, 0.5) / count_by_definition(64, 1, 1.0))
    assert saving.lines[0].get_xydata().tolist() == [pytest.approx([theory, 65]), pytest.approx([0, 0], abs=1e-9)]
    bar, _ = saving.collections[0].get_segments()
    assert bar.tolist() == [pytest.approx([theory, 50]), pytest.approx([theory, 80])]
    legend = [text.get_text() for text in counts.get_legend().get_texts()]
    assert legend == ["64 patches", "256 patches", "paper's count", "computed", "printed in the paper"]
    colors = {axis_line.get_color() for axis_line in counts.lines}
    assert len(colors) == 2
    assert "8 clips per call, 6 rounds" in figure.get_supxlabel()
    assert len(plot_table2(count_rows("ast_base", 128, [1.0, 0.5])).axes) == 1
