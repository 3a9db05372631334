"""Weights of a checkpoint of any known format by the names of our models, before they are loaded into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..constants import PATCH
from ..errors import UserError
from ..models.ast import AST
from ..models.patches import Stride, check_stride
from .converters import AST_HUGGING_FACE, AST_HUGGING_FACE_MODULES, Format, detect_format
from .huggingface import read_config, stride_of
from .positions import guess_stride
from .state_files import find_file, read_state


@dataclass(frozen=True)
class Weights:
    """Weights of a checkpoint.

    Attributes:
        path: the file that was read.
        format: its format.
        tensors: tensors by our names.
        sources: keys in the file of the parts of each tensor, by our names.
        unused: keys in the file that have no equivalent.
        recorded_stride: stride of the positions, ``(frequency, time)``, as the file or the ``config.json`` next to it
            says; None if neither does.
    """

    path: Path
    format: Format
    tensors: Mapping[str, torch.Tensor]
    sources: Mapping[str, Sequence[str]]
    unused: Sequence[str]
    recorded_stride: tuple[int, int] | None

    @property
    def patches(self) -> int:
        """Patches in the position table of an AST."""
        return self.tensors["pos_embed"].shape[-2] - AST.num_extra_tokens

    def check_family(self, name: str) -> None:
        """Raise a ``UserError`` if the weights do not belong to the family of the model of this name."""
        family = self.format.family
        if name.partition("_")[0] != family:
            raise UserError(
                f"{self.path}: {self.format.name}, which does not fit the model {name}; create an {family} model, for "
                f"example with create_model({family + '_base'!r})"
            )

    def stride_for(self, name: str, frames: int, asked: Stride | None = None) -> tuple[int, int]:
        """Stride of the positions: as recorded, else by the size of the table (``positions.guess_stride``).

        Args:
            name: name of the model for the weights.
            frames: its frames.
            asked: its stride; None if nobody asked for one.

        Raises:
            UserError: the weights belong to another family, or the stride is unknown.
        """
        self.check_family(name)
        if self.recorded_stride is not None:
            return self.recorded_stride
        try:
            return guess_stride(self.patches, frames, asked)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from error


def read_weights(path: str | Path) -> Weights:
    """Read the weights of a checkpoint, on the CPU.

    Args:
        path: a file, folder or Hub name, as for :func:`~pruneattn.load_checkpoint`.

    Raises:
        UserError: the file does not exist, is damaged, is unsafe to open or has no known format.
    """
    path = find_file(path)
    state, config = read_state(path)
    format_ = detect_format(state, path)
    sources, unused = format_.sources(state)
    tensors = {name: _joined([state[key] for key in keys], keys, path) for name, keys in sources.items()}
    stride: tuple[int, int] | None = None
    if format_.family == "audiomae":
        stride = (PATCH, PATCH)
    elif config:
        stride = check_stride(config.get("stride") or PATCH)  # versions before strides wrote none
    elif format_ in (AST_HUGGING_FACE, AST_HUGGING_FACE_MODULES) and (theirs := read_config(path)) is not None:
        stride = stride_of(theirs, path)
    return Weights(path, format_, tensors, sources, unused, stride)


def _joined(tensors: list[torch.Tensor], keys: Sequence[str], path: Path) -> torch.Tensor:
    """Concatenate the parts of a tensor, such as query, key and value."""
    if len(tensors) == 1:
        return tensors[0]
    try:
        return torch.cat(tensors)
    except RuntimeError as error:
        shapes = ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in zip(keys, tensors, strict=True))
        raise UserError(f"{path}: parts of one layer do not fit together: {shapes}; download it again") from error
