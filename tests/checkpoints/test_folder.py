import json
import os
from unittest import mock

import pytest
import torch
from safetensors import safe_open

from pruneattn.checkpoints.folder import write_folder
from pruneattn.errors import UserError

STATE = {"a": torch.arange(3.0)}


def write(folder, state=STATE, value=1, card="card\n", own="kind"):
    write_folder(folder, state, {"config.json": {"kind": value}}, card, own=own, metadata={"more": "text"})


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_is_created_and_written_again(tmp_path):
    folder = tmp_path / "new" / "folder"
    write(folder)
    write(folder, value=2)
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]
    assert json.loads((folder / "config.json").read_text()) == {"kind": 2}
    assert (folder / "README.md").read_text() == "card\n"
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "more": "text"}
        assert torch.equal(file.get_tensor("a"), STATE["a"])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_all_or_nothing(tmp_path, name):
    """If the disk fills up while the last file is written, the old files are kept."""
    write(tmp_path)
    before = contents(tmp_path)
    target = "safetensors" if name == "model.safetensors" else "json"
    failure = OSError(28, "No space left on device")
    patched = {"safetensors": "pruneattn.checkpoints.folder.save_file", "json": "pathlib.Path.write_text"}[target]
    with mock.patch(patched, side_effect=failure), pytest.raises(UserError, match="No space left"):
        write(tmp_path, {"a": torch.zeros(3)}, value=2)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("text", ['{"epochs": 3}', "{", "[]", "3"])
def test_another_kind_of_config_is_not_replaced(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    before = contents(tmp_path)
    with pytest.raises(
        UserError, match="contains another kind of config.json, for example of a training run; choose another"
    ):
        write(tmp_path)
    assert contents(tmp_path) == before


def test_an_edited_readme_is_not_replaced(tmp_path):
    (tmp_path / "README.md").write_text("# Mine\n")
    write(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine\n" and (tmp_path / "model.safetensors").exists()


def test_a_path_that_is_not_a_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    for place in ("file", "file/below"):
        with pytest.raises(UserError, match="cannot create the folder .*file.*choose another folder"):
            write(tmp_path / place)
