import json
import os
import subprocess
import sys

import pytest

from pruneattn.errors import UserError
from pruneattn.labelling import label_files
from pruneattn.labelling.label_files import LabelFile

ABOUT = {"pruneattn": "0.1.0", "checkpoint": "runs/a", "sha256": "ab", "keep_rates": [0.5, 0.5], "top_k": 2}


def row_of(number, windows=0):
    best = {"labels": ["dög", "cat"], "scores": [0.75, 0.25]}
    row = {"path": f"ä/{number}.wav", "seconds": 0.5 * number, **best}
    if windows:
        row["windows"] = [{"start": float(start), "end": start + 1.0, **best} for start in range(windows)]
    return row


def read(path):
    """All rows of either kind of file."""
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()


def write(path, rows, about=ABOUT, failed=(), **options):
    with LabelFile(path, about, **options) as output:
        done = output.done
        for row in rows:
            output.add(row)
        for clip in failed:
            output.fail(clip, "bad")
    return done


@pytest.fixture(params=["jsonl", "parquet"])
def path(request, tmp_path):
    if request.param == "parquet":
        pytest.importorskip("pyarrow")
    return tmp_path / f"out.{request.param}"


def test_written_rows_are_read_back_and_continued(path, tmp_path):
    rows = [row_of(number) for number in range(5)]
    assert write(path, rows[:2]) == set()
    assert write(path, []) == {row["path"] for row in rows[:2]}
    assert write(path, rows[2:]) == {row["path"] for row in rows[:2]}
    assert read(path) == rows
    assert json.loads((tmp_path / f"{path.name}.about.json").read_text()) == ABOUT
    assert sorted(os.listdir(tmp_path)) == sorted([path.name, f"{path.name}.about.json"])


def test_windows(path):
    rows = [row_of(1, windows=3), row_of(2, windows=1)]
    write(path, rows, windows=True)
    assert read(path) == rows


def test_failures_are_those_of_the_last_run(path, tmp_path):
    failed = tmp_path / f"{path.name}.failed.jsonl"
    write(path, [row_of(1)], failed=["a.wav", "b.wav"])
    assert read(failed) == [{"path": "a.wav", "error": "bad"}, {"path": "b.wav", "error": "bad"}]
    write(path, [row_of(2)], failed=["b.wav"])
    assert read(failed) == [{"path": "b.wav", "error": "bad"}]
    write(path, [])
    assert not failed.exists()


def test_an_error_keeps_the_rows_added_before(path):
    with pytest.raises(ZeroDivisionError), LabelFile(path, ABOUT) as output:
        output.add(row_of(1))
        1 / 0  # noqa: B018
    assert read(path) == [row_of(1)]
    assert write(path, [row_of(2)]) == {row_of(1)["path"]}  # and the file is not locked


def test_labels_of_other_settings_are_rejected(path, tmp_path):
    write(path, [row_of(1)])
    write(path, [], about={**ABOUT, "checkpoint": "moved/a"})
    write(path, [], about={**ABOUT, "pruneattn": "9.0.0"})
    for change in ({"sha256": "cd"}, {"keep_rates": [1.0, 1.0]}, {"top_k": 3}, {"amp": "bf16"}):
        (name,) = change
        with pytest.raises(UserError, match=f"made with other settings .{name}: .* -> .*another --output"):
            write(path, [row_of(2)], about={**ABOUT, **change})
    about = tmp_path / f"{path.name}.about.json"
    about.unlink()
    with pytest.raises(UserError, match="which describes them, cannot be read"):
        write(path, [row_of(2)])
    assert read(path) == [row_of(1)] and not about.exists()


def test_an_empty_file_accepts_any_settings(path, tmp_path):
    write(path, [])
    write(path, [row_of(1)], about={**ABOUT, "top_k": 9})
    assert json.loads((tmp_path / f"{path.name}.about.json").read_text())["top_k"] == 9


def test_a_second_writer_is_rejected(path):
    pytest.importorskip("fcntl")
    with LabelFile(path, ABOUT) as output:
        output.add(row_of(1))
        with pytest.raises(UserError, match="another process is writing"):
            LabelFile(path, ABOUT)
        output.add(row_of(2))
    assert read(path) == [row_of(1), row_of(2)]


def test_the_lock_covers_the_last_part(tmp_path, monkeypatch):
    """The last rows are written when the file is closed."""
    pytest.importorskip("fcntl")
    parquet = pytest.importorskip("pyarrow.parquet")
    path, rejected = tmp_path / "out.parquet", []
    write_table = parquet.write_table

    def write_while_another_process_tries(*arguments):
        with pytest.raises(UserError, match="another process is writing"):
            LabelFile(path, ABOUT)
        rejected.append(True)
        write_table(*arguments)

    monkeypatch.setattr(parquet, "write_table", write_while_another_process_tries)
    write(path, [row_of(1)])
    assert rejected == [True] and read(path) == [row_of(1)]


def test_parts_are_numbered_under_the_lock(tmp_path, monkeypatch):
    """Another process may write a part until the lock is held."""
    pytest.importorskip("pyarrow")
    path, locked = tmp_path / "out.parquet", label_files.locked

    def locked_late(*arguments):
        monkeypatch.setattr(label_files, "locked", locked)
        write(path, [row_of(1)])
        return locked(*arguments)

    monkeypatch.setattr(label_files, "locked", locked_late)
    assert write(path, [row_of(2)]) == {row_of(1)["path"]}
    assert read(path) == [row_of(1), row_of(2)]


def test_an_incomplete_last_line_is_removed(tmp_path):
    path = tmp_path / "out.jsonl"
    write(path, [row_of(1), row_of(2)])
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in (first + 1, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert write(path, [row_of(2)]) == {row_of(1)["path"]}
        assert path.read_bytes() == whole


def test_other_damage_raises(tmp_path):
    path = tmp_path / "out.jsonl"
    write(path, [row_of(1), row_of(2)])
    before = path.read_bytes().replace(b"{", b"", 1)
    path.write_bytes(before)
    with pytest.raises(UserError, match="out.jsonl, line 1: not the labels of a clip"):
        write(path, [row_of(3)])
    assert path.read_bytes() == before

    parquet = tmp_path / "out.parquet"
    pytest.importorskip("pyarrow")
    write(parquet, [row_of(1)])
    (parquet / "part-00000.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match="part-00000.parquet: not a readable label file"):
        write(parquet, [row_of(2)])


def test_names_that_cannot_be_written(tmp_path):
    (tmp_path / "file.parquet").touch()
    (tmp_path / "folder.jsonl").mkdir()
    for name, message in [
        ("a.json", "must end in .jsonl or .parquet"),
        ("no/a.jsonl", "the folder .*no does not exist"),
        ("folder.jsonl", "cannot write .*Is a directory"),
        ("file.parquet", "it is a file, not a folder"),
    ]:
        if "parquet" in name:
            pytest.importorskip("pyarrow")
        with pytest.raises(UserError, match=message):
            LabelFile(tmp_path / name, ABOUT)


def test_parts_are_written_by_number_of_labels_and_by_time(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    path = tmp_path / "out.parquet"
    parts = lambda: sorted(os.listdir(path))  # noqa: E731
    monkeypatch.setattr(label_files, "PART_LABELS", 4)
    with LabelFile(path, ABOUT, windows=True) as output:
        output.add(row_of(1, windows=1))
        assert parts() == []
        output.add(row_of(2, windows=1))  # a clip's labels and a window's, twice
        assert parts() == ["part-00000.parquet"]
        monkeypatch.setattr(label_files, "PART_SECONDS", -1)
        output.add(row_of(3, windows=1))
        assert parts() == ["part-00000.parquet", "part-00001.parquet"]
        monkeypatch.setattr(label_files, "PART_SECONDS", 1000)
        output.add(row_of(4, windows=1))
    assert len(parts()) == 3
    write(path, [row_of(5, windows=1)], windows=True)
    assert len(parts()) == 4 and [row["seconds"] for row in read(path)] == [0.5, 1.0, 1.5, 2.0, 2.5]


def test_without_pyarrow_parquet_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'pruneattn\[parquet\]'"):
        LabelFile(tmp_path / "out.parquet", ABOUT)
    assert os.listdir(tmp_path) == []


FULL_DISK = """
import os, resource, sys
from pathlib import Path
from pruneattn.labelling import label_files
from pruneattn.errors import UserError

path, limit = Path(sys.argv[1]), int(sys.argv[2])
label_files.PART_LABELS = 1
try:
    with label_files.LabelFile(path, {}) as output:
        output.add({"path": "first", "seconds": 1.0, "labels": ["a"], "scores": [1.0]})
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # writes fail part way, as on a full disk
        for number in range(1000):
            output.add({"path": f"{number:03d}", "seconds": 1.0, "labels": [os.urandom(2500).hex()], "scores": [1.0]})
except UserError as error:
    print(error)
"""


def test_a_full_disk_keeps_complete_rows(path):
    pytest.importorskip("resource")
    command = [sys.executable, "-c", FULL_DISK, str(path), "12000" if path.suffix == ".jsonl" else "4000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith(f"cannot write {path}") and "ree some space" in done.stdout, done.stderr
    rows = [row["path"] for row in read(path)]
    assert rows == (["first", "000", "001"] if path.suffix == ".jsonl" else ["first"])
    if path.suffix == ".jsonl":
        assert path.read_bytes().endswith(b"\n")
    assert write(path, [], about={}) == set(rows)
