import os
import subprocess
import sys

import pytest
import torch

from pruneattn.errors import UserError
from pruneattn.files import atomic_write, atomic_write_all


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
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(RuntimeError, match="of the block"), atomic_write(path):
        raise RuntimeError("of the block")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["state.pt"]


def test_permissions_follow_the_umask(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "x.safetensors") as temporary:
            save_file({"x": torch.zeros(1)}, temporary)  # makes a file that only its owner can read
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o640


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "real").mkdir()
    link = tmp_path / "last.pt"
    link.symlink_to(tmp_path / "real" / "last.pt")
    with atomic_write(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink() and (tmp_path / "real" / "last.pt").read_text() == "new"


def test_refusals_name_the_path(tmp_path):
    with pytest.raises(UserError, match="absent.*No such file"), atomic_write(tmp_path / "absent" / "x.pt"):
        pytest.fail("the block must not run")
    with pytest.raises(UserError, match="is a folder"), atomic_write(tmp_path):
        pytest.fail("the block must not run")


FULL_DISK = """
import resource, sys, torch
from safetensors.torch import save_file
from pruneattn.errors import UserError
from pruneattn.files import atomic_write

resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # writes fail half way, as they do on a full disk
tensor = torch.zeros(100_000)
for name, save in (
    ("x.pt", lambda path: torch.save(tensor, path)),
    ("x.safetensors", lambda path: save_file({"x": tensor}, path)),
    ("x.bin", lambda path: path.write_bytes(bytes(100_000))),
):
    try:
        with atomic_write(f"{sys.argv[1]}/{name}") as temporary:
            save(temporary)
    except UserError as error:
        print(error)
"""


def test_a_full_disk_keeps_the_old_file(tmp_path):
    pytest.importorskip("resource")
    for name in ("x.pt", "x.safetensors", "x.bin"):
        (tmp_path / name).write_text("old")
    run = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=120)
    lines = run.stdout.splitlines()
    assert len(lines) == 3, run.stderr
    for name, line in zip(("x.pt", "x.safetensors", "x.bin"), lines, strict=True):
        assert line.startswith(f"cannot write {tmp_path}/{name}: ") and "is unchanged" in line
        assert (tmp_path / name).read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["x.bin", "x.pt", "x.safetensors"]


def test_several_files_are_replaced_together(tmp_path):
    folder = tmp_path / "new" / "folder"
    with atomic_write_all(folder, ["a", "b"]) as temporary:
        assert not (folder / "a").exists() and list(temporary) == ["a", "b"]
        for name, path in temporary.items():
            path.write_text(name)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"a": "a", "b": "b"}
    with pytest.raises(KeyError), atomic_write_all(folder, ["a", "b", "c"]) as temporary:
        temporary["a"].write_text("new")
        raise KeyError
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"a": "a", "b": "b"}
    with pytest.raises(UserError, match="cannot make the folder .*a: .*; choose another place"):
        with atomic_write_all(folder / "a", ["x"]):
            pass
