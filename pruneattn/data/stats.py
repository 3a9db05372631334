"""Normalization statistics of a dataset."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..errors import UserError
from .fbank import kaldi_fbank

_LEAST_STD = 1e-3  # silence has a smaller std, from rounding only; real audio has a std a thousand times larger


class Stats(NamedTuple):
    """Statistics of the log-mel of a dataset.

    Attributes:
        mean: mean.
        std: standard deviation.
        clips: number of clips that were read.
        failed: ``(index, message)`` of the clips that could not be read.
    """

    mean: float
    std: float
    clips: int
    failed: list[tuple[int, str]]


def dataset_stats(dataset: Dataset[Any], *, workers: int = 0, progress: bool = True) -> Stats:
    """Compute mean and (population) standard deviation of the log-mel of a dataset, for ``FeatureConfig``.

    Every frame of every clip counts once, without padding. AST's published statistics include padding, so they are
    lower for data with many short clips. Sums are float64. A clip that cannot be read is left out and listed.

    Args:
        dataset: its items are dicts with ``index``, ``wave`` (float32 ``[L]`` or None) and ``error`` (the reason for
            None).
        workers: processes that decode.
        progress: show a progress bar.

    Raises:
        UserError: no clip could be read, or the clips are silent.
    """
    total = squares = 0.0
    cells = clips = 0
    failed: list[tuple[int, str]] = []
    # One clip at a time, because lengths may differ a lot and a batch would be padded to the longest.
    items: DataLoader[Any] = DataLoader(dataset, batch_size=None, num_workers=workers)
    for item in tqdm(items, total=len(items), desc="statistics", unit="clip", disable=None if progress else True):
        if item["wave"] is None:
            failed.append((item["index"], item["error"]))
            continue
        log_mel = kaldi_fbank(item["wave"][None])[0].double()
        total += log_mel.sum().item()
        squares += log_mel.square().sum().item()
        cells += log_mel.numel()
        clips += 1
    if not clips:
        reason = f"; the first error: {failed[0][1]}" if failed else ""
        raise UserError(f"none of {len(items)} clips could be read, so there are no statistics{reason}")
    mean = total / cells
    std = math.sqrt(max(0.0, squares / cells - mean * mean))
    if not (math.isfinite(mean) and _LEAST_STD < std < math.inf):
        raise UserError(
            f"the log-mel of {clips} clips has mean {mean:g}, std {std:g}, which cannot normalize it; "
            "are the clips silent? Use clips with sound"
        )
    return Stats(mean, std, clips, failed)
