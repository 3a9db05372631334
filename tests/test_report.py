"""The list of clips that could not be read, and Markdown tables."""

import os

from pruneattn.report import markdown_lines, save_failed, say_failed


def test_clips_that_could_not_be_read_are_listed_with_the_reason(tmp_path):
    path = save_failed(tmp_path, [(os.fsdecode(b"\xff.wav"), "the file\nis empty"), ("b.wav", "no sound")])
    assert path == tmp_path / "failed_clips.txt"
    assert path.read_text() == "\\udcff.wav\tthe file is empty\nb.wav\tno sound\n"


def test_the_list_of_an_earlier_run_is_removed(tmp_path):
    path = save_failed(tmp_path, [("b.wav", "no sound")])
    assert save_failed(tmp_path, []) == path and not path.exists()


def test_the_first_clips_that_could_not_be_read_are_printed(tmp_path, capsys):
    say_failed([], 5, tmp_path)
    assert capsys.readouterr().out == ""
    say_failed([("0.wav", "0.wav: no sound"), *((f"{i}.wav", "empty") for i in range(1, 12))], 20, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "12 of 20 clips could not be read and do not count:"
    assert lines[2:4] == ["  0.wav: no sound", "  1.wav: empty"]
    assert lines[11:] == ["  9.wav: empty", f"  and 2 more, all listed in {tmp_path}"]


def test_markdown_columns_are_aligned_and_none_is_a_dash():
    columns = [("rate", "rate", "{:g}".format), ("saving", "saving", "{:.0%}".format)]
    rows = [{"rate": 0.25, "saving": None}, {"rate": 1, "saving": 0.5}]
    assert markdown_lines(columns, rows) == [
        "| rate | saving |",
        "|-----:|-------:|",
        "| 0.25 |      - |",
        "|    1 |    50% |",
    ]
