import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from pruneattn.errors import UserError
from pruneattn.files import (
    atomic_write,
    atomic_write_all,
    json_values,
    locked,
    make_folder,
    write_csv,
    write_json,
    write_lines,
)


def test_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "state.pt"
    path.write_text("old")
    with atomic_write(path) as temporary:
        assert temporary.parent == tmp_path and temporary.name.startswith(".")
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["state.pt"]


def test_an_exception_keeps_the_old_file(tmp_path):
    path = tmp_path / "state.pt"
    path.write_text("old")

    def stop(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), atomic_write(path) as temporary:
        stop(temporary)
    with pytest.raises(RuntimeError, match="of the block"), atomic_write(path):
        raise RuntimeError("of the block")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["state.pt"]


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "x.safetensors") as temporary:
            save_file({"x": torch.zeros(1)}, temporary)  # creates a file that only its owner can read
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o640


def test_a_symbolic_link_is_preserved(tmp_path):
    (tmp_path / "real").mkdir()
    link = tmp_path / "last.pt"
    link.symlink_to(tmp_path / "real" / "last.pt")
    with atomic_write(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink() and (tmp_path / "real" / "last.pt").read_text() == "new"


def test_errors_name_the_path(tmp_path):
    with pytest.raises(UserError, match="absent.*No such file"), atomic_write(tmp_path / "absent" / "x.pt"):
        pytest.fail("the block must not run")
    with pytest.raises(UserError, match="is a folder"), atomic_write(tmp_path):
        pytest.fail("the block must not run")


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("x.pt", lambda tensor, path: torch.save(tensor, path)),
        ("x.safetensors", lambda tensor, path: save_file({"x": tensor}, path)),
        ("x.bin", lambda tensor, path: path.write_bytes(bytes(4 * len(tensor)))),
    ],
)
def test_a_full_disk_keeps_the_old_file(tmp_path, name, save):
    resource = pytest.importorskip("resource")
    path = tmp_path / name
    path.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # writes fail half way, as on a full disk
    try:
        with pytest.raises(UserError) as error, atomic_write(path) as temporary:
            save(torch.zeros(100_000), temporary)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = str(error.value)
    assert message.startswith(f"cannot write {path}: ") and "The existing file is unchanged" in message
    assert path.read_text() == "old" and os.listdir(tmp_path) == [name]


def test_several_files_are_replaced_together(tmp_path):
    folder = tmp_path / "new" / "folder"
    with atomic_write_all(folder, ["a", "b"]) as temporary:
        assert not (folder / "a").exists() and list(temporary) == ["a", "b"]
        for name, path in temporary.items():
            path.write_text(name)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"a": "a", "b": "b"}

    def fail(temporary):
        temporary["a"].write_text("new")
        raise KeyError

    with pytest.raises(KeyError), atomic_write_all(folder, ["a", "b", "c"]) as temporary:
        fail(temporary)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"a": "a", "b": "b"}
    message = "cannot create the folder .*a: .*; choose another folder"
    with pytest.raises(UserError, match=message), atomic_write_all(folder / "a", ["x"]):
        pytest.fail("the block must not run")


def test_json_has_no_nan(tmp_path):
    assert json_values({"a": [math.nan, 1.0], "b": (math.inf, "x")}) == {"a": [None, 1.0], "b": [None, "x"]}
    write_json(tmp_path / "a.json", {"a": -math.inf})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": None}


def test_names_that_are_not_utf8_are_escaped(tmp_path):
    name = os.fsdecode(b"\xff.wav")
    write_lines(tmp_path / "a.txt", [name, 1])
    write_csv(tmp_path / "a.csv", [{"path": name, "label": "a,b"}])
    assert (tmp_path / "a.txt").read_text() == "\\udcff.wav\n1\n"
    assert (tmp_path / "a.csv").read_text() == 'path,label\n\\udcff.wav,"a,b"\n'


def test_a_folder_for_results_is_checked_to_be_writable(tmp_path):
    assert make_folder(tmp_path / "a" / "b").is_dir() and not os.listdir(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to .*file: .*; choose another folder with --output"):
        make_folder(tmp_path / "file")


HOLDER = """
import os, sys, time
from pruneattn.files import locked
with locked(sys.argv[1], "wait"):
    if os.fork() == 0:
        print("forked", flush=True)
        time.sleep(60)
    time.sleep(60)
"""


def test_a_lock_ends_with_its_process(tmp_path):
    """A forked process, such as a loader worker, must not keep the lock of a killed parent."""
    pytest.importorskip("fcntl")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as holder:
        try:
            assert holder.stdout.readline() == "forked\n"
            with pytest.raises(UserError, match="another process is writing there; wait until it ends, or wait"):
                locked(tmp_path, "wait").__enter__()
            holder.kill()
            holder.wait()
            with locked(tmp_path, "wait"):
                pass
        finally:
            os.killpg(holder.pid, signal.SIGKILL)


def test_a_lock_ends_with_its_block(tmp_path):
    pytest.importorskip("fcntl")
    with locked(tmp_path, "wait"), pytest.raises(UserError, match="another process is writing"):
        locked(tmp_path, "wait").__enter__()
    with locked(tmp_path, "wait"):
        pass
