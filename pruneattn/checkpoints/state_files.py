"""Tensors from PyTorch and safetensors files. No code in a file is ever executed."""

from __future__ import annotations

import argparse
import json
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import UserError
from .hub import download, is_hub_name

#: Weights in a folder: of a training run, the usual name, and the name that Hugging Face used until 2023.
WEIGHTS = ("best.safetensors", "model.safetensors", "pytorch_model.bin")
#: Key of the safetensors metadata of this package's own files; its value is JSON.
METADATA = "pruneattn"
#: End of the name of a layer's scales, which its weight has if it is int8: ``<layer>.weight_scale``.
SCALE = ".weight_scale"
DAMAGED = "it is truncated or damaged: copy or download it again"


def find_file(path: str | Path, names: Sequence[str] = WEIGHTS) -> Path:
    """Find the file of a checkpoint: `path` itself, or the first of `names` in the folder or Hub repository `path`.

    A local path takes precedence over a Hub repository of the same name.

    Raises:
        UserError: there is no such file, folder or repository, or it holds none of `names`.
    """
    path, given = Path(path), str(path)
    if path.is_file():
        return path
    if not path.is_dir():
        if is_hub_name(given):
            return download(given, names)
        raise UserError(
            f"{path}: no such checkpoint; use an existing file, a folder that holds {_either(names)}, or the name of "
            "a repository on the Hugging Face Hub (user/name)"
        )
    for name in names:
        if (path / name).is_file():
            return path / name
    if any(path.glob("*.index.json")):
        raise UserError(
            f"{path}: the weights are split over several files; save them as one, for example with Hugging "
            "Face's save_pretrained(folder, max_shard_size='100GB')"
        )
    raise UserError(f"{path}: the folder holds no {_either(names)}; use the path of the checkpoint file")


def read_state(path: Path) -> tuple[dict[str, torch.Tensor], Mapping[str, Any]]:
    """Read a PyTorch or safetensors file, on the CPU.

    The state dict may be nested under ``"model"`` or ``"state_dict"``. Prefixes that ``DataParallel`` (``module.``) and
    ``torch.compile`` (``_orig_mod.``) add to every key are removed.

    Returns:
        The tensors by key; and the configuration of the model, if this package wrote the file with it: the arguments of
        ``create_model``, or the options of a training run. It is empty for all other files.

    Raises:
        UserError: the file is damaged, is not a checkpoint, or contains objects other than plain data.
    """
    if is_safetensors(path):
        tensors, metadata = read_safetensors(path)
        return dequantized(_state(tensors, path)), _model_of(metadata)
    content = _read_torch(path)
    return _state(content, path), _options_of(content)


def dequantized(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict with dequantized weights, float32, in place of 8-bit weights and their scales."""
    plain = {name: tensor for name, tensor in state.items() if not name.endswith(SCALE)}
    for name in state.keys() - plain.keys():
        weight = name.removesuffix(SCALE) + ".weight"
        plain[weight] = state[weight].float() * state[name].unsqueeze(-1)
    return plain


def _state(content: Mapping[Any, Any], path: Path) -> dict[str, torch.Tensor]:
    """The state dict in the content of a file, without the prefixes of wrappers."""
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


def _model_of(metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """The arguments of ``create_model`` in the metadata of a safetensors file; empty if there are none."""
    try:
        config = json.loads(metadata[METADATA])["model"]
    except (KeyError, TypeError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _options_of(content: Mapping[Any, Any]) -> Mapping[str, Any]:
    """The options of the training run whose state a PyTorch file holds; empty for other files."""
    options = content.get("config")
    return options if isinstance(options, dict) and "prune_blocks" in options else {}


def is_safetensors(path: Path) -> bool:
    """Whether the first bytes of a file are those of safetensors (True) or of a PyTorch format (False).

    Raises:
        UserError: they are neither.
    """
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
        raise UserError(f"{path}: a web page, not a checkpoint; download the file that the page links to")
    raise UserError(f"{path}: neither a PyTorch nor a safetensors file; use a checkpoint")


def read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read the tensors by key and the metadata (strings by key) of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise UserError(f"{path}: not readable as safetensors ({error}); {DAMAGED}") from error


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file, strings by key, without its tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{path}: not readable as safetensors ({error}); {DAMAGED}") from error


def _read_torch(path: Path) -> Mapping[Any, Any]:
    try:
        # AudioMAE's training script stores its options as a Namespace, a plain record that is safe to create.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        needed = re.search(r"GLOBAL (\S+)", str(error))
        if needed is None:
            raise UserError(f"{path}: not readable as a PyTorch checkpoint; {DAMAGED}") from error
        raise UserError(
            f"{path}: rejected, because it contains Python objects next to the weights ({needed[1]}), and loading such "
            "objects can run any code. If you trust its source, open it in a separate Python session with "
            "torch.load(path, weights_only=False), save only the weights with torch.save(content['model'], "
            "'weights.pth') and use that file"
        ) from error
    except Exception as error:  # torch raises RuntimeError, EOFError, KeyError, ... on a damaged file
        raise UserError(f"{path}: not readable as a PyTorch checkpoint ({type(error).__name__}); {DAMAGED}") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a state dict; save model.state_dict()")
    return content


def _either(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + f" or {names[-1]}"
