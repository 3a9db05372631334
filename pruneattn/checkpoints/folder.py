"""A folder with a model's weights, what configures them and a card, as it is put on the Hugging Face Hub."""

import json
from pathlib import Path

from safetensors.torch import save_file

from ..errors import UserError
from ..files import atomic_write_all
from .card import CARD, may_replace
from .hub import CONFIG

WEIGHTS = "model.safetensors"


def write_folder(folder, state, configs, card, *, own, metadata=None):
    """Write ``model.safetensors``, JSON files and a card into a folder: all of them or, when that fails, none.

    Args:
        folder: made where it is absent.
        state: tensors by key.
        configs: dicts by file name, ``config.json`` among them.
        card: text of ``README.md``; it is left out where there is one of somebody else's.
        own: key of ``config.json`` by which an older one, which may be replaced, is known to be of this kind.
        metadata: further strings by key for the safetensors file.

    Raises:
        UserError: the files cannot be written, or the folder holds the ``config.json`` of something else.
    """
    folder = Path(folder)
    if (folder / CONFIG).exists() and own not in _keys(folder / CONFIG):
        raise UserError(f"{folder} holds a {CONFIG} of something else, as of a training run; choose another folder")
    texts = {name: json.dumps(values, indent=2, ensure_ascii=False) + "\n" for name, values in configs.items()}
    if may_replace(folder / CARD):
        texts[CARD] = card
    with atomic_write_all(folder, [WEIGHTS, *texts]) as temporary:
        save_file(state, temporary[WEIGHTS], metadata={"format": "pt", **(metadata or {})})
        for name, text in texts.items():
            temporary[name].write_text(text, encoding="utf-8")


def _keys(path):
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ()
    return values if isinstance(values, dict) else ()
