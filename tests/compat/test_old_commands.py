"""The commands of version 0.1.0 still accept their options and resume the work that it left unfinished."""

import csv
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pruneattn

SOUNDS = "--dataset folder --data-dir sounds --device cpu"
SPEED = ("clips_per_second", "saving", "realised")
_CHECKPOINT = "--model --num-classes --frames --mean --std --padding --score"
_DATA = "--dataset --split --data-dir --fold --manifest --label-csv --workers"
_ANALYSIS = f"{_CHECKPOINT} {_DATA} --output --device --batch-size --limit"
#: Options of each command and subcommand.
COMMANDS = {
    "train": (
        "--model --size --embed-dim --depth --num-heads --init --dataset --data-dir --fold --train-manifest "
        "--val-manifest --test-manifest --label-csv --cache --no-cache --workers --output --resume --branch-from "
        "--device --amp --compile --no-compile --deterministic --no-deterministic --seed --eval-every --save-minutes "
        "--log-every --tensorboard --no-tensorboard --epochs --batch-size --accumulate --optimizer --lr --lr-batch "
        "--schedule --min-lr --lr-step-first --lr-step-every --lr-step-factor --warmup-epochs --warmup-steps --betas "
        "--weight-decay --layer-decay --drop-path --clip-grad --loss --metric --keep-rate --shrink-start "
        "--shrink-epochs --prune-blocks --score --frames --padding --mean --std --gain --no-gain --mixup "
        "--specaug-freq --specaug-time --noise --no-noise --mask-time --mask-freq --mask-1d"
    ),
    "evaluate": f"{_CHECKPOINT} {_DATA} --keep-rate --output --device --batch-size --amp --rounds --compile",
    "predict": (
        f"{_CHECKPOINT} --data-dir --top-k --keep-rate --overlap --windows --label-csv --dataset --amp --batch-size "
        "--output --workers --plot --device"
    ),
    "convert": f"{_CHECKPOINT} --format --label-csv --dataset",
    "export": f"{_CHECKPOINT} --format --output --keep-rate --waveform --dtype --kernels --dataset --device",
    "data list": "",
    "data fetch": "",
    "data stats": "--dataset --data-dir --split --fold --manifest --label-csv --frames --workers",
}
SCRIPTS = {
    "table1": "--rankings --keep-rates --seeds --output --report",
    "table2": "--model --frames --keep-rate --output --device --batch-size --amp --rounds --compile",
    "clusters": f"{_ANALYSIS} --statistic",
    "kept_patches": f"{_ANALYSIS} --keep-rate --clips --match",
    "kendall": f"{_ANALYSIS} --clusters",
    "remove_clusters": f"{_ANALYSIS} --clusters --after-block",
    "kept_histogram": f"{_ANALYSIS} --clusters --keep-rate --against --against-model",
}


def options_in(text):
    return set(re.findall(r"(?<![\w-])--[a-z0-9][a-z0-9-]*", text))


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", COMMANDS)
def test_command_has_its_options(name, programs):
    command, *subcommand = name.split()
    assert set(COMMANDS[name].split()) <= options_in(programs.command(command, *subcommand, "--help"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_has_its_options(name, programs):
    assert set(SCRIPTS[name].split()) <= options_in(programs.script(name, "--help"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "data"])  # a module and a package; all other modules start in the same way
def test_command_runs_in_a_process(name, environment, tmp_path):
    words = [sys.executable, "-m", f"pruneattn.{name}", "--help"]
    output = subprocess.run(words, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert f"pruneattn.{name}" in output or f"pruneattn {name}" in output


# Training -----------------------------------------------------------------------------------------------------------


def check_completed(folder, log_before, wanted, fbank):
    """A resumed run ends like the uninterrupted run."""
    assert (folder / "log.jsonl").read_bytes().startswith(log_before)
    losses = [line["loss"] for line in lines_of(folder / "log.jsonl") if line["kind"] == "step"]
    assert losses == pytest.approx(wanted["losses"], rel=1e-3)
    result = json.loads((folder / "result.json").read_text())
    assert_same_result(result, wanted["result"])
    with torch.no_grad():
        logits = pruneattn.load_pretrained(folder)(fbank)
    torch.testing.assert_close(logits, torch.tensor(wanted["logits"]), rtol=1e-2, atol=1e-3)


def assert_same_result(new, old):
    """Every value of the old result, numbers up to the rounding that training adds up."""
    if isinstance(old, dict):
        assert old.keys() <= new.keys()
        for key in old:
            assert_same_result(new[key], old[key])
    elif isinstance(old, float):
        assert new == pytest.approx(old, rel=1e-2, abs=1e-3)
    else:
        assert new == old


def test_a_run_resumes(programs, old, expected, fbank):
    wanted = expected["runs"]["run"]
    run = old("run", "sounds")
    log = (run / "log.jsonl").read_bytes()
    programs.command("train", *wanted["options"].split(), "--output", "run", "--resume")
    check_completed(run, log, wanted, fbank)


def test_a_run_resumes_from_its_path_with_options_that_may_change(programs, old, expected, fbank):
    wanted = expected["runs"]["run"]
    run = old("run", "sounds")
    log = (run / "log.jsonl").read_bytes()
    programs.command("train", *wanted["options"].split(), "--cache", "--save-minutes", 5, "--resume", "run")
    check_completed(run, log, wanted, fbank)


def test_a_run_does_not_resume_with_another_recipe(programs, old, expected):
    run = old("run", "sounds")
    log = (run / "log.jsonl").read_bytes()
    words = [*expected["runs"]["run"]["options"].split(), "--output", "run", "--resume", "--lr", "0.5"]
    assert "lr: 0.02 -> 0.5" in programs.rejected("train", *words)
    assert (run / "log.jsonl").read_bytes() == log


def test_a_run_branches_from_an_old_trunk(programs, old, expected):
    run = old("run", "sounds")
    words = [*expected["runs"]["run"]["options"].split(), "--keep-rate", "0.25", "--branch-from", "run/trunk.pt"]
    programs.command("train", *words, "--output", "branch")
    before, after = (lines_of(folder / "log.jsonl") for folder in (run, Path("branch")))
    assert after[:3] == before[:3] and [line["kind"] for line in after].count("epoch") == 3
    assert list(pruneattn.load_pretrained("branch").keep_rates) == [0.25, 0.25]


@pytest.mark.slow
def test_a_run_on_toy_sounds_resumes(programs, old, expected, fbank):
    wanted = expected["runs"]["toy-run"]
    run = old("toy-run")
    log = (run / "log.jsonl").read_bytes()
    programs.command("train", *wanted["options"].split(), "--output", "toy-run", "--resume")
    check_completed(run, log, wanted, fbank)


def test_a_run_starts_from_old_weights(programs, old, expected):
    old("sounds", "converted")
    words = expected["runs"]["run"]["options"].replace("--embed-dim 16 --depth 3", "--embed-dim 24 --depth 4")
    words = words.replace("--num-heads 2", "--num-heads 3")
    output = programs.command("train", *words.split(), "--output", "new", "--init", "converted/audiomae.pth")
    assert "converted/audiomae.pth" in output and Path("new/result.json").exists()


# Labels -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["labels.jsonl", "labels.parquet"])
def test_labels_resume(name, programs, old, expected):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    wanted = expected["labels"][name]
    labels = old(name, f"{name}.about.json", f"{name}.failed.jsonl", "ast.safetensors", "sounds")
    before = read_labels(labels)
    assert [row["path"] for row in before] == wanted["labeled"] and len(before) == 2
    words = ["ast.safetensors", "sounds/test", "--output", name, "--top-k", 2, *wanted["options"].split()]
    programs.command("predict", *words, "--device", "cpu")
    rows = read_labels(labels)
    assert rows[:2] == before
    assert_same_rows(rows, wanted["rows"])
    assert [row["path"] for row in lines_of(Path(f"{name}.failed.jsonl"))] == ["sounds/test/tone/broken.wav"]


def read_labels(path):
    if path.suffix == ".jsonl":
        return lines_of(path)
    from pyarrow import parquet

    return parquet.read_table(path).to_pylist()


def assert_same_rows(rows, wanted):
    """The same clips in any order, their labels in the same order, and scores up to rounding."""
    rows, wanted = ({row["path"]: row for row in table} for table in (rows, wanted))
    assert rows.keys() == wanted.keys()
    for path, row in rows.items():
        parts = [(row, wanted[path]), *zip(row.get("windows", ()), wanted[path].get("windows", ()), strict=True)]
        for new, old in parts:
            assert list(new) == list(old) and new["labels"] == old["labels"]
            assert new["scores"] == pytest.approx(old["scores"], abs=1e-4)


def test_labels_of_other_options_are_not_continued(programs, old):
    labels = old("labels.jsonl", "labels.jsonl.about.json", "ast.safetensors", "sounds")
    before = labels.read_bytes()
    words = f"ast.safetensors sounds/test --output {labels} --top-k 3 --device cpu"
    assert "top_k: 2 -> 3" in programs.rejected("predict", *words.split())
    assert labels.read_bytes() == before


def test_labels_on_standard_output(programs, old, expected):
    old("ast.safetensors", "sounds")
    words = "ast.safetensors sounds/test --top-k 2 --output - --device cpu".split()
    rows = [json.loads(line) for line in programs.command("predict", *words).splitlines()]
    assert_same_rows(rows, expected["labels"]["labels.jsonl"]["rows"])
    text = programs.command("predict", *words[:4], *"--keep-rate 0.5 --device cpu".split())
    assert text.count("sounds/test/") == 4


# Evaluation ---------------------------------------------------------------------------------------------------------


def test_evaluation_writes_the_same_table(programs, old, files):
    """Several values after --keep-rate that cannot be one per pruning block are a sweep."""
    old("ast.safetensors", "sounds")
    words = f"ast.safetensors {SOUNDS} --keep-rate 1.0 0.7 0.5 --batch-size 2 --rounds 1 --output new"
    programs.command("evaluate", *words.split())
    before, after = (json.loads((folder / "table.json").read_text()) for folder in (files / "evaluation", Path("new")))
    assert before.keys() <= after.keys() and len(after["rows"]) == 3
    same = ("checkpoint model score dataset split fold clips failed missing metric amp batch_size").split()
    assert {name: before[name] for name in same} == {name: after[name] for name in same}
    assert [path for path, _ in after["unread"]] == [path for path, _ in before["unread"]]
    assert_same_table(before["rows"], after["rows"])
    tables = []
    for folder in (files / "evaluation", Path("new")):
        with open(folder / "table.csv", newline="") as file:
            tables.append(list(csv.DictReader(file)))
        assert len((folder / "failed_clips.txt").read_text().splitlines()) == 1
    assert_same_table(*tables)
    for rate in ("1", "0.7", "0.5"):
        with (
            open(files / f"evaluation/per_class_{rate}.csv") as old_file,
            open(f"new/per_class_{rate}.csv") as new_file,
        ):
            assert set(next(csv.reader(old_file))) <= set(next(csv.reader(new_file)))
    assert "| keep-rate |" in Path("new/table.md").read_text()


def assert_same_table(before, after):
    """All old columns exist, and the numbers that do not depend on the machine are the same."""
    for old, new in zip(before, after, strict=True):
        assert set(old) <= set(new)
        for name in set(old) - set(SPEED):
            assert float(new[name]) == pytest.approx(float(old[name]), rel=1e-6), name
        assert float(new["clips_per_second"]) > 0 and math.isfinite(float(new["saving"]))


def test_evaluation_at_one_keep_rate(programs, old, files):
    old("ast.safetensors", "sounds")
    programs.command("evaluate", "ast.safetensors", *SOUNDS.split(), *"--keep-rate 0.7 --rounds 0 --output new".split())
    (row,) = json.loads(Path("new/table.json").read_text())["rows"]
    wanted = json.loads((files / "evaluation/table.json").read_text())["rows"][1]
    assert row == pytest.approx({name: value for name, value in wanted.items() if name not in SPEED})


# Conversion, export, data -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["ast.safetensors", "converted/huggingface"])
@pytest.mark.filterwarnings("ignore:Hugging Face's ASTFeatureExtractor:UserWarning")
def test_conversion_of_ast_writes_the_same_files(programs, files, tmp_path, source):
    programs.command("convert", files / source, tmp_path / "ast.pth", "--format", "ast")
    old, new = (torch.load(path, weights_only=True) for path in (files / "converted/ast.pth", tmp_path / "ast.pth"))
    assert_same_tensors(old, new)
    programs.command("convert", files / source, tmp_path / "huggingface", "--format", "huggingface")
    assert_same_folder(files / "converted/huggingface", tmp_path / "huggingface")


def test_conversion_of_audiomae_writes_the_same_files(programs, files, tmp_path):
    source = files / "audiomae"
    programs.command("convert", source, tmp_path / "audiomae.pth", "--format", "audiomae")
    paths = (files / "converted/audiomae.pth", tmp_path / "audiomae.pth")
    old, new = (torch.load(path, weights_only=True) for path in paths)
    assert old.keys() == new.keys() == {"model"}
    assert_same_tensors(old["model"], new["model"])
    programs.command("convert", source, tmp_path / "timm", "--format", "timm")
    assert_same_folder(files / "converted/timm", tmp_path / "timm")


def assert_same_folder(old, new):
    assert {path.name for path in old.iterdir()} <= {path.name for path in new.iterdir()}
    assert_same_tensors(*(load_file(folder / "model.safetensors") for folder in (old, new)))
    before, after = (json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (old, new))
    # Arguments of prune. Either name of the blocks is valid.
    pruning = [sorted(map(str, config.pop("pruneattn", {}).values())) for config in (before, after)]
    assert before == after and pruning[0] == pruning[1]


def assert_same_tensors(old, new):
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)


@pytest.mark.slow
def test_exported_program_computes_the_same(programs, old, expected, fbank, close):
    old("ast.safetensors")
    words = "ast.safetensors --format torch --keep-rate 0.5 --device cpu --output model.pt2"
    programs.command("export", *words.split())
    program = torch.export.load("model.pt2").module()
    close(program(fbank).detach(), expected["models"]["ast"]["logits_at"]["0.5"])


def test_data_commands(programs, old, expected):
    listed = programs.command("data", "list")
    assert all(f"{name}:" in listed for name in pruneattn.data.DATASETS)
    old("sounds")
    numbers = r"mean (-?[\d.]+), std ([\d.]+)"
    stats = programs.command("data", *"stats --dataset folder --data-dir sounds".split())
    found, wanted = (list(map(float, re.search(numbers, text).groups())) for text in (stats, expected["stats"]))
    assert found == pytest.approx(wanted, abs=1e-4)


# The paper's tables and figures -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_clusters_of_patches_are_the_same(programs, old, files):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    old("ast.safetensors", "sounds")
    programs.script("clusters", "ast.safetensors", *SOUNDS.split(), *"--statistic intensity --output new".split())
    before, after = (json.loads((folder / "clusters.json").read_text()) for folder in (files / "clusters", Path("new")))
    assert before.keys() <= after.keys()
    for name in ("statistic", "clips", "patches"):
        assert before[name] == after[name]
    for name in ("boundaries", "centres", "shares", "mean", "std"):
        assert after[name] == pytest.approx(before[name], rel=1e-3, abs=1e-3)
    assert Path("new/clusters.csv").exists() and Path("new/clusters.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "kendall --clusters clusters/clusters.json",
        "remove_clusters --clusters clusters/clusters.json",
        "kept_histogram --clusters clusters/clusters.json --against ast.safetensors --keep-rate 0.5",
        "kept_patches --keep-rate 0.5 --clips 2",
    ],
    ids=lambda words: words.split()[0],
)
def test_figures_are_made_from_old_clusters(programs, old, words):
    pytest.importorskip("matplotlib")
    pytest.importorskip("scipy")
    old("ast.safetensors", "sounds", "clusters")
    name, *options = words.split()
    programs.script(name, "ast.safetensors", *SOUNDS.split(), *options)
    assert all(Path("results", name, f"{name}.{suffix}").stat().st_size for suffix in ("csv", "png", "pdf"))


def test_table2_counts_a_sweep_of_keep_rates(programs, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    programs.script(
        "table2", *"--model audiomae_base --frames 1024 --keep-rate 0.7 0.5 --rounds 0 --device cpu".split()
    )
    with open("results/table2/table2.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {float(row["keep_rate"]) for row in rows} >= {0.7, 0.5}


@pytest.mark.slow
def test_table1_resumes(programs, old, expected):
    pytest.importorskip("matplotlib")
    pytest.importorskip("scipy")
    table = old("table1", "sounds")
    unpruned = (table / "unpruned-seed0/predictions.npz").read_bytes()
    report = expected["table1"]["options"].split()
    report.insert(report.index("--"), "--report")
    assert "1 of 2 runs are missing: attention-0.5-seed0" in programs.script("table1", *report)
    programs.script("table1", *expected["table1"]["options"].split())
    assert (table / "attention-0.5-seed0/predictions.npz").exists() and (table / "table1.csv").exists()
    assert (table / "unpruned-seed0/predictions.npz").read_bytes() == unpruned
