import json
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool

import pytest

from pruneattn.errors import UserError
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


def row_source(error):
    yield row_of(1)
    yield row_of(2)
    raise error


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt(), BrokenProcessPool("died"), UserError("bad")])
def test_labels_that_are_ready_are_written_before_an_error(tmp_path, name, error):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    with pytest.raises(type(error)):
        write_labels(row_source(error), 3, LabelFile(tmp_path / name, {}))
    assert LabelFile(tmp_path / name, {}).done == {"1.wav", "2.wav"}


BLOCKED = """
import os, sys
from pruneattn.labelling import deadline
from pruneattn.errors import UserError
from pruneattn.labelling.label_files import LabelFile
from pruneattn.labelling.write_labels import write_labels

deadline.SECONDS = 0.3

def rows():
    for number in range(2):
        yield {"path": f"{number}.wav", "seconds": 1.0, "labels": ["dog"], "scores": [0.75]}
    print("ready", flush=True)
    os.read(os.pipe()[0], 1)  # Python repeats the read after a signal

write_labels(rows(), 3, LabelFile(sys.argv[1], {}))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM there")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_a_signal_ends_a_blocked_read(tmp_path, name, signum):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    command = [sys.executable, "-c", BLOCKED, str(tmp_path / name)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signum)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    assert f"stopped by {signum.name}, 0.3 s after it, because the clip in progress did not end; run the same" in said
    assert LabelFile(tmp_path / name, {}).done == {"0.wav", "1.wav"}
