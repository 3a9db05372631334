"""Tensors out of the files that people have. Nothing in a file is ever executed."""

import argparse
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import UserError
from . import hub

# Weights in a folder: of a training run, as saved by most, as saved by Hugging Face until 2023.
WEIGHTS = ("best.safetensors", "model.safetensors", "pytorch_model.bin")
DAMAGED = "it is truncated or damaged: copy or download it again"


def find_file(path, names=WEIGHTS):
    """Path of a checkpoint: `path` itself, or the first of `names` in the folder or Hub repository `path`.

    What exists here goes before what the Hub has by that name.
    """
    path, given = Path(path), str(path)
    if path.is_file():
        return path
    if not path.is_dir():
        if hub.is_hub_name(given):
            return hub.download(given, names)
        raise UserError(
            f"{path}: no such checkpoint; give an existing file, a folder that holds {_either(names)}, or the name of "
            "a repository on the Hugging Face Hub (user/name)"
        )
    for name in names:
        if (path / name).is_file():
            return path / name
    if any(path.glob("*.index.json")):
        raise UserError(
            f"{path}: the weights are split over several files; save them as one, as with Hugging Face's "
            "save_pretrained(folder, max_shard_size='100GB')"
        )
    raise UserError(f"{path}: the folder holds no {_either(names)}; give the checkpoint's own path")


def read_state(path):
    """Tensors by key of a PyTorch or safetensors file, on the CPU.

    The state dict may lie under ``"model"`` or ``"state_dict"``; the prefixes that ``DataParallel`` (``module.``) and
    ``torch.compile`` (``_orig_mod.``) put before every key are taken off.

    Raises:
        UserError: the file is missing, damaged, something else, or needs more than plain data to be unpickled.
    """
    content = read_safetensors(path)[0] if is_safetensors(path) else _read_torch(path)
    for _ in range(3):
        inner = [content[key] for key in ("model", "state_dict") if isinstance(content.get(key), Mapping)]
        if not inner:
            break
        content = inner[0]
    state = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}
    if not state:
        found = ", ".join(str(key) for key in list(content)[:8]) or "nothing"
        raise UserError(f"{path}: no state dict in it, neither at the top nor under 'model' or 'state_dict' ({found})")
    for prefix in ("module.", "_orig_mod.", "module."):  # DataParallel around compile, or compile around DataParallel
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def is_safetensors(path):
    """Whether a file looks like safetensors (True) or like PyTorch's formats (False), by its first bytes."""
    with open(path, "rb") as file:
        head = file.read(64)
    if head[8:9] == b"{":  # eight bytes of length, then JSON
        return True
    if head.startswith((b"PK\x03\x04", b"\x80")):  # zip; or a bare pickle, as before PyTorch 1.6
        return False
    if not head:
        raise UserError(f"{path}: the file is empty; copy or download it again")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: only a Git LFS pointer to the weights; fetch them with `git lfs pull`")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise UserError(f"{path}: a web page, not a checkpoint; download the file that the page offers")
    raise UserError(f"{path}: neither a PyTorch nor a safetensors file; give a checkpoint")


def read_safetensors(path):
    """Tensors by key and the metadata (strings by key) of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{path}: not readable as safetensors ({error}); {DAMAGED}") from error


def _read_torch(path):
    try:
        # AudioMAE's training script stores its command line as a Namespace: a plain record, harmless to make.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        needed = re.search(r"GLOBAL (\S+)", str(error))
        if needed is None:
            raise UserError(f"{path}: not readable as a PyTorch checkpoint; {DAMAGED}") from error
        raise UserError(
            f"{path}: refused, because it holds Python objects beside the weights ({needed[1]}), and loading such "
            "objects can run any code. If you trust where it comes from, open it in a Python session of its own with "
            "torch.load(path, weights_only=False), store the weights alone with torch.save(content['model'], "
            "'weights.pth') and use that file"
        ) from error
    except Exception as error:  # torch raises RuntimeError, EOFError, KeyError, ... on a damaged file
        raise UserError(f"{path}: not readable as a PyTorch checkpoint ({type(error).__name__}); {DAMAGED}") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a state dict; save model.state_dict()")
    return content


def _either(names):
    return ", ".join(names[:-1]) + f" or {names[-1]}"
