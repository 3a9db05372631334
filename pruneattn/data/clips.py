"""Labelled clips: the one dataset class that every reader fills."""

import os
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch
from tqdm import tqdm

from ..constants import SAMPLE_RATE
from ..errors import UserError
from .decode import load_audio


@dataclass(frozen=True)
class Clip:
    """One sound file and the numbers of its classes."""

    path: Path
    labels: tuple[int, ...]


class ClipDataset(torch.utils.data.Dataset):
    """Clips that are decoded on access; item ``i`` depends on nothing but ``i``.

    Args:
        name: The data set's name, for messages.
        clips: The clips, in an order that does not depend on the machine.
        labels: Display name of each class.
        multilabel: Whether a clip can have several classes.
        missing: Files that were listed but are not there.
        max_samples: Longer clips are cut to their first ``max_samples`` samples (at 16 kHz).
        cache: Decode every clip now and keep it in memory: 4 bytes a sample, 64 KB for each second of sound, once per
            process (loader workers share it). Worth it from the second epoch on when it fits: Speech Commands takes
            5.4 GB, 2000 clips of ESC-50 0.6 GB, 20,000 clips of AudioSet 13 GB.
    """

    def __init__(self, name, clips, labels, *, multilabel, missing=(), max_samples=None, cache=False):
        self.name = name
        self.clips = list(clips)
        self.labels = list(labels)
        self.num_classes = len(self.labels)
        self.multilabel = multilabel
        self.missing = list(missing)
        self.max_samples = max_samples
        self._cache = None
        if cache:
            self.fill_cache()

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        """One clip; one that cannot be decoded comes back with its error instead of raising.

        Returns:
            dict of ``index`` (int), ``wave`` (float32 ``[L]`` at 16 kHz, or None), ``target`` (float32
            ``[num_classes]``, ones at the clip's classes) and ``error`` (str, or None).
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

    def read(self, index):
        """Decode clip ``index``: float32 ``[L]``. Raises ``UserError`` where that is impossible."""
        seconds = self.max_samples / SAMPLE_RATE if self.max_samples else None
        return load_audio(self.clips[index].path, seconds=seconds)

    def _try_read(self, index):
        try:
            return self.read(index)[: self.max_samples], None
        except (UserError, OSError) as error:
            return None, str(error)

    def fill_cache(self):
        """Decode every clip and keep it in memory, as ``cache`` does at once."""
        # One buffer, not one tensor per clip: workers that start by fork share it, others get a single handle.
        samples, ends, errors = bytearray(), [], {}
        with ThreadPool(min(8, os.cpu_count() or 1)) as pool:
            decoded = pool.imap(self._try_read, range(len(self)))
            progress = tqdm(decoded, total=len(self), desc=f"decoding {self.name}", unit="clip", disable=None)
            for index, (wave, error) in enumerate(progress):
                if error is None:
                    samples += wave.numpy().tobytes()
                else:
                    errors[index] = error
                ends.append(len(samples) // 4)
        samples = torch.frombuffer(samples, dtype=torch.float32) if samples else torch.empty(0)
        self._cache = samples, ends, errors
