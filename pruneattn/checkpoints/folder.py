"""A folder with weights, configuration and model card, in the layout of the Hugging Face Hub."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..errors import UserError
from ..files import atomic_write_all
from .card import CARD, may_replace
from .hub import CONFIG

WEIGHTS = "model.safetensors"


def write_folder(
    folder: str | Path,
    state: dict[str, torch.Tensor],
    configs: Mapping[str, Mapping[str, Any]],
    card: str,
    *,
    own: str,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write ``model.safetensors``, JSON files and a card into a folder: all of them, or none on an error.

    Args:
        folder: created if it does not exist.
        state: tensors by key.
        configs: contents of the JSON files by file name, including ``config.json``.
        card: text of ``README.md``. A ``README.md`` of another origin or an edited card is kept.
        own: a key of ``config.json``. An existing ``config.json`` is replaced only if it has this key.
        metadata: further strings by key for the safetensors file.

    Raises:
        UserError: the files cannot be written, or the folder holds another kind of ``config.json``.
    """
    folder = Path(folder)
    if (folder / CONFIG).exists() and own not in _keys(folder / CONFIG):
        raise UserError(
            f"{folder} contains another kind of {CONFIG}, for example of a training run; choose another folder"
        )
    texts = {name: json.dumps(values, indent=2, ensure_ascii=False) + "\n" for name, values in configs.items()}
    if may_replace(folder / CARD):
        texts[CARD] = card
    with atomic_write_all(folder, [WEIGHTS, *texts]) as temporary:
        save_file(state, temporary[WEIGHTS], metadata={"format": "pt", **(metadata or {})})
        for name, text in texts.items():
            temporary[name].write_text(text, encoding="utf-8")


def _keys(path: Path) -> Collection[str]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ()
    return values if isinstance(values, dict) else ()
