import json
import signal

import pytest

from pruneattn.labelling.label_files import LabelFile
from pruneattn.labelling.write_labels import Terminal, write_labels


def row_of(number):
    return {"path": f"{number}.wav", "seconds": 0.5 * number, "labels": ["dog", "cat"], "scores": [0.75, 0.25]}


def test_summary(tmp_path, capsys):
    path = tmp_path / "out.jsonl"
    rows = [row_of(7200), {"path": "x.wav", "error": "bad"}, row_of(3600)]
    assert write_labels(rows, 3, LabelFile(path, {})) == 0
    said = capsys.readouterr()
    assert said.err.startswith("2 clips with 1.50 hours of audio in ") and said.out == ""
    assert f"1 of 3 clips could not be labeled, listed in {path}.failed.jsonl" in said.err
    assert write_labels(rows[1:2], 1, LabelFile(path, {})) == 0  # the labels of the previous run exist
    assert capsys.readouterr().err.startswith("2 clips are already labeled; 1 remain\n")
    assert write_labels(rows[1:2], 1, Terminal(as_json=True)) == 1
    assert capsys.readouterr().err.splitlines()[-2:] == ["1 of 1 clips could not be labeled:", "  x.wav: bad"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_between_two_clips(tmp_path, signum, capsys):
    path = tmp_path / "out.jsonl"

    def rows():
        for number in range(5):
            if number == 2:
                signal.raise_signal(signum)
            yield row_of(number)

    assert write_labels(rows(), 5, LabelFile(path, {})) == 128 + signum
    assert [json.loads(line) for line in path.read_text().splitlines()] == [row_of(number) for number in range(3)]
    assert f"stopped by {signum.name}; run the same command again to resume" in capsys.readouterr().err
