"""Labeled clips: the dataset class of all readers."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..constants import SAMPLE_RATE
from .decode import decoding_error, load_audio


@dataclass(frozen=True)
class Clip:
    """An audio file and the numbers of its classes."""

    path: Path
    labels: tuple[int, ...]


class ClipDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Clips that are decoded on access. Item ``i`` depends on ``i`` only.

    Args:
        name: name of the dataset, for messages.
        clips: the clips, in an order that does not depend on the machine.
        labels: display name of each class.
        multilabel: whether a clip can have several classes.
        missing: files that were listed but do not exist.
        max_samples: longer clips are cut to their first ``max_samples`` samples (at 16 kHz).
        cache: decode every clip now and keep it in memory: 4 bytes per sample, 64 KB per second, once per process
            (loader workers share it). It saves time from the second epoch on. Speech Commands takes 5.4 GB, 2000 clips
            of ESC-50 0.6 GB, 20,000 clips of AudioSet 13 GB.
    """

    def __init__(
        self,
        name: str,
        clips: Iterable[Clip],
        labels: Iterable[str],
        *,
        multilabel: bool,
        missing: Iterable[Any] = (),
        max_samples: int | None = None,
        cache: bool = False,
    ) -> None:
        self.name = name
        self.clips = list(clips)
        self.labels = list(labels)
        self.num_classes = len(self.labels)
        self.multilabel = multilabel
        self.missing = list(missing)
        self.max_samples = max_samples
        self._cache: tuple[Tensor, list[int], dict[int, str]] | None = None
        if cache:
            self.fill_cache()

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Decode one clip. A clip that cannot be decoded is returned with its error; nothing is raised.

        Returns:
            dict with ``index`` (int), ``wave`` (float32 ``[L]`` at 16 kHz, or None), ``target`` (float32
            ``[num_classes]``, 1 at the classes of the clip) and ``error`` (str, or None).
        """
        target = torch.zeros(self.num_classes)
        target[list(self.clips[index].labels)] = 1.0
        if self._cache is None:
            wave, error = self._try_read(index)
        else:
            samples, ends, errors = self._cache
            start = ends[index - 1] if index > 0 else 0
            error = errors.get(index)
            wave = samples[start : ends[index]] if error is None else None
        return {"index": index, "wave": wave, "target": target, "error": error}

    def read(self, index: int) -> Tensor:
        """Decode clip ``index`` to float32 ``[L]``. Raises ``UserError`` if that is impossible."""
        seconds = self.max_samples / SAMPLE_RATE if self.max_samples else None
        return load_audio(self.clips[index].path, seconds=seconds)

    def _try_read(self, index: int) -> tuple[Tensor | None, str | None]:
        try:
            return self.read(index)[: self.max_samples], None
        except Exception as error:  # no clip may end the work on all other clips
            return None, decoding_error(self.clips[index].path, error)

    def fill_cache(self) -> None:
        """Decode every clip and keep it in memory, as with ``cache=True``."""
        # One buffer, not one tensor per clip: forked workers share it, and spawned workers get a single handle.
        buffer = bytearray()
        ends: list[int] = []
        errors: dict[int, str] = {}
        with ThreadPool(min(8, os.cpu_count() or 1)) as pool:
            decoded = pool.imap(self._try_read, range(len(self)))
            progress = tqdm(decoded, total=len(self), desc=f"decoding {self.name}", unit="clip", disable=None)
            for index, (wave, error) in enumerate(progress):
                if wave is not None:
                    buffer += wave.numpy().tobytes()
                else:
                    errors[index] = str(error)
                ends.append(len(buffer) // 4)
        samples = torch.frombuffer(buffer, dtype=torch.float32) if buffer else torch.empty(0)
        self._cache = samples, ends, errors
