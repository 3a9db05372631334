"""``pruneattn analyze``: names, help, shared options, and the deprecated scripts of ``python/``."""

import csv
import importlib
import re
import shutil
from pathlib import Path

import pytest

from pruneattn.analysis.__main__ import main
from pruneattn.analysis.commands import ANALYSES
from pruneattn.analysis.commands.options import make_clips_parser, open_analysis
from pruneattn.errors import UserError

#: Analyses that were scripts before they became commands.
WERE_SCRIPTS = [name for name in ANALYSES if name != "precision"]
SCRIPTS = Path(__file__).parents[2] / "python"


def printed_help(capsys, run, *words):
    """Standard output of a command that prints its help, as one line."""
    with pytest.raises(SystemExit) as left:
        run([*words])
    assert left.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_the_help_lists_every_analysis(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = printed_help(capsys, main, "--help")
    assert text.startswith("usage: pruneattn analyze ") and len(ANALYSES) == 8
    assert all(f"{name} {line}" in text for name, line in ANALYSES.items())


@pytest.mark.parametrize("name", ANALYSES)
def test_every_analysis_has_its_help_and_module(name, capsys):
    text = printed_help(capsys, main, name, "--output", "somewhere", "--help")
    assert text.startswith(f"usage: pruneattn analyze {name} ") and f"results/{name}" in text
    module = importlib.import_module(f"pruneattn.analysis.commands.{name}")
    assert printed_help(capsys, module.main, "--help") == text


def test_unknown_names_are_rejected_in_one_line(capsys):
    with pytest.raises(
        UserError, match=r"^unknown analysis 'Cluster' \(did you mean 'clusters'\?\): choose one of table1, "
    ):
        main(["Cluster", "--help"])
    with pytest.raises(UserError, match=r"^unknown analysis 'accuracy': choose one of table1, table2, .*precision$"):
        main(["accuracy"])
    with pytest.raises(SystemExit) as left:
        main([])
    assert left.value.code == 2 and "required: NAME" in capsys.readouterr().err


@pytest.mark.parametrize("name", WERE_SCRIPTS)
def test_scripts_are_deprecated_aliases(name, capsys, load_file):
    script = load_file(SCRIPTS / f"{name}.py")
    expected = printed_help(capsys, main, name, "--help")
    with pytest.raises(SystemExit):
        script.main(["--help"])
    text = capsys.readouterr()
    assert text.err == f"warning: python/{name}.py is deprecated: use pruneattn analyze {name}\n"
    assert " ".join(text.out.split()) == expected


def test_a_script_reads_the_command_line(tmp_path, monkeypatch, load_file):
    pytest.importorskip("matplotlib")
    words = ["--model", "ast_tiny", "--frames", "32", "--keep-rate", "0.7", "0.5", "--rounds", "0"]
    monkeypatch.setattr("sys.argv", ["table2.py", *words, "--device", "cpu", "--output", str(tmp_path)])
    assert load_file(SCRIPTS / "table2.py").main() == 0
    with open(tmp_path / "table2.csv", newline="") as file:
        assert [row["keep_rate"] for row in csv.DictReader(file)] == ["0.7", "0.5"]


def test_parsed_options_become_arguments(analysis_run, tmp_path):
    run = analysis_run("ast")
    parser = make_clips_parser("clusters", "Writes nothing.")
    analysis = open_analysis(parser.parse_args([*run.options(tmp_path / "new" / "out"), "--limit", "5"]))
    assert analysis.model.name == "ast_tiny" and len(analysis.dataset) == 7 and analysis.device.type == "cpu"
    assert (analysis.data, analysis.batch_size, analysis.workers, analysis.limit) == ("folder, test", 3, 0, 5)
    assert (tmp_path / "new" / "out").is_dir() and analysis.failed == []
    for options, message in ((["--limit", "0"], "--limit 0"), (["--batch-size", "0"], "--batch-size 0")):
        with pytest.raises(UserError, match=f"{message}: must be at least 1"):
            open_analysis(parser.parse_args([*run.options(tmp_path), *options]))


def test_a_keep_rate_can_be_given_for_each_pruning_block(analysis_run, analyze, tmp_path):
    run = analysis_run("ast")  # three pruning blocks, 64 patches
    for words in (["0.5"], ["0.5,0.25,1"], ["0.5", "0.25", "1"]):
        analyze("kept_patches", *run.options(tmp_path), "--limit", "1", "--clips", "1", "--keep-rate", *words)
        with open(tmp_path / "kept_patches.csv", newline="") as file:
            patches = [int(row["patches"]) for row in csv.DictReader(file)]
        assert patches == ([64, 32, 16, 8] if words == ["0.5"] else [64, 32, 8, 8])
    with pytest.raises(UserError, match="keep_rate"):
        analyze("kept_patches", *run.options(tmp_path), "--keep-rate", "0.5,0.25")


def test_unreadable_clips_are_reported_and_listed(analysis_run, analyze, analysis_clips, tmp_path, capsys):
    run, data, output = analysis_run("ast"), tmp_path / "clips", tmp_path / "out"
    shutil.copytree(analysis_clips, data)
    (data / "test" / "buzz" / "broken.wav").write_text("no sound")
    run.data = data
    analyze("kept_patches", *run.options(output), "--clips", "1")
    text = capsys.readouterr().out
    assert "1 of 8 clips could not be read" in text and text.count("broken.wav") == 1
    assert re.search(r"broken\.wav.*\S", (output / "failed_clips.txt").read_text())
    run.data = analysis_clips
    analyze("kept_patches", *run.options(output), "--clips", "1")
    assert not (output / "failed_clips.txt").exists() and "could not" not in capsys.readouterr().out
