"""Reading tensors from files, without executing anything in them."""

import argparse
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from pruneattn.checkpoints.state_files import find_file, read_state
from pruneattn.errors import UserError

NAMES = ("model.safetensors", "pytorch_model.bin")
STATE = {"a.weight": torch.arange(1000.0), "b.bias": torch.arange(3).half()}


def save_legacy(content, path):
    """The format before PyTorch 1.6."""
    torch.save(content, path, _use_new_zipfile_serialization=False)


def assert_state(path):
    state, _ = read_state(path)
    assert list(state) == list(STATE)
    for key, value in STATE.items():
        assert state[key].dtype == value.dtype and torch.equal(state[key], value)


@pytest.mark.parametrize("save", [torch.save, save_legacy, save_file])
def test_formats_are_recognized_by_content(tmp_path, save):
    save(STATE, tmp_path / "weights.anything")
    assert_state(tmp_path / "weights.anything")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("keys", [(), ("model",), ("state_dict",), ("model", "state_dict")])
def test_prefixes_of_wrappers_are_removed(tmp_path, prefix, keys):
    content = {prefix + key: value for key, value in STATE.items()}
    for key in reversed(keys):
        content = {"epoch": 3, "optimizer": {"state": {0: torch.ones(1)}}, key: content}
    torch.save(content, tmp_path / "x.pt")
    assert_state(tmp_path / "x.pt")


def test_a_prefix_of_only_some_keys_is_kept(tmp_path):
    save_file({"module.x": torch.ones(1), "y": torch.ones(1)}, tmp_path / "x")
    assert set(read_state(tmp_path / "x")[0]) == {"module.x", "y"}


@pytest.mark.parametrize("save", [torch.save, save_legacy])
def test_a_namespace_next_to_the_weights_is_allowed(tmp_path, save):
    save({"model": STATE, "args": argparse.Namespace(lr=0.1, model="vit")}, tmp_path / "x.pth")
    assert_state(tmp_path / "x.pth")


def test_folders(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    assert find_file(tmp_path, NAMES) == tmp_path / "pytorch_model.bin"
    (tmp_path / "model.safetensors").touch()
    assert find_file(str(tmp_path), NAMES) == tmp_path / "model.safetensors"
    assert find_file(tmp_path / "pytorch_model.bin", NAMES) == tmp_path / "pytorch_model.bin"


def test_folders_without_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match="no such checkpoint; .* holds model.safetensors or pytorch_model.bin"):
        find_file(tmp_path / "absent", NAMES)
    with pytest.raises(UserError, match="the folder holds no model.safetensors or pytorch_model.bin"):
        find_file(tmp_path, NAMES)
    (tmp_path / "model.safetensors.index.json").touch()
    with pytest.raises(UserError, match="split over several files"):
        find_file(tmp_path, NAMES)


def half_of(save):
    def write(path):
        save(STATE, path)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])

    return write


BAD_FILES = {
    "empty": (lambda path: path.write_bytes(b""), "the file is empty; copy or download it again"),
    "text": (lambda path: path.write_text("hello " * 50), "neither a PyTorch nor a safetensors file"),
    "web page": (lambda path: path.write_text("\n<!DOCTYPE html><html>"), "a web page, not a checkpoint"),
    "pointer": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "truncated zip": (half_of(torch.save), "not readable as a PyTorch checkpoint.*truncated or damaged"),
    "truncated pickle": (half_of(save_legacy), "not readable as a PyTorch checkpoint.*truncated or damaged"),
    "truncated safetensors": (half_of(save_file), "not readable as safetensors.*truncated or damaged"),
    "list": (lambda path: torch.save([torch.ones(1)], path), "holds a list, not a state dict"),
    "no tensors": (lambda path: torch.save({"epoch": 3, 4: 5}, path), r"no state dict in it.*\(epoch, 4\)"),
    "nothing": (lambda path: torch.save({}, path), r"no state dict in it.*\(nothing\)"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_rejected(tmp_path, case):
    write, message = BAD_FILES[case]
    path = tmp_path / "checkpoint"
    write(path)
    with pytest.raises(UserError, match=message) as error:
        read_state(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("save", [torch.save, save_legacy, lambda x, path: path.write_bytes(pickle.dumps(x, 2))])
def test_a_file_that_would_run_code_is_rejected(tmp_path, save):
    path, trap = tmp_path / "evil.pth", tmp_path / "executed"
    save({"epoch": 3, "args": Malicious(trap)}, path)
    with pytest.raises(UserError, match=r"rejected, .*mkdir.*can run any code\. If you trust") as error:
        read_state(path)
    assert not trap.exists() and str(error.value).startswith(str(path))
    pickle.loads(pickle.dumps(Malicious(trap)))
    assert trap.exists()  # without the check, the file runs code
