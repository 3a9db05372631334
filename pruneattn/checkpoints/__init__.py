"""Checkpoints of this package and of other projects: reading, writing, model cards and the Hugging Face Hub.

- :func:`load_pretrained` and :func:`save_pretrained` read and write complete models: weights, configuration and
  description. The first also opens folders of Hugging Face's AST.
- :func:`load_checkpoint` and :func:`save_checkpoint` convert weights from and to the formats of other projects.
- :func:`open_checkpoint` and :func:`open_dataset` open any checkpoint and a dataset with the same classes, as the
  commands do.
"""

from .load_checkpoint import LoadReport, load_checkpoint
from .opening import open_checkpoint, open_dataset
from .pretrained import load_pretrained, save_pretrained
from .save_checkpoint import save_checkpoint

__all__ = [
    "LoadReport",
    "load_checkpoint",
    "load_pretrained",
    "open_checkpoint",
    "open_dataset",
    "save_checkpoint",
    "save_pretrained",
]
