"""Normalisation statistics of one's own data."""

import math
from typing import NamedTuple

from torch.utils.data import DataLoader
from tqdm import tqdm

from ..errors import UserError
from .fbank import kaldi_fbank

_LEAST_STD = 1e-3  # rounding leaves less of silence, and real sound has a thousand times as much


class Stats(NamedTuple):
    """Mean and standard deviation of a data set's log-mel; how many clips they rest on; ``(index, message)`` of the
    clips that could not be read."""

    mean: float
    std: float
    clips: int
    failed: list


def dataset_stats(dataset, *, workers=0, progress=True):
    """Mean and (population) standard deviation of the log-mel over a data set, for ``FeatureConfig``.

    Every frame of every clip counts once, and padding does not: AST's published statistics were taken over padded
    inputs, so on data with many short clips they come out lower. Sums are kept in float64. A clip that cannot be read
    is left out and listed.

    Args:
        dataset: items are dicts with ``index``, ``wave`` (float32 ``[L]`` or None) and ``error`` (why it is None).
        workers: processes that decode.
        progress: show a progress bar.

    Raises:
        UserError: no clip could be read, or there is nothing to normalise with in what they hold.
    """
    total = squares = 0.0
    cells = clips = 0
    failed = []
    # One clip at a time: their lengths may differ a lot, and a batch would be as long as its longest.
    items = DataLoader(dataset, batch_size=None, num_workers=workers)
    for item in tqdm(items, total=len(dataset), desc="statistics", unit="clip", disable=None if progress else True):
        if item["wave"] is None:
            failed.append((item["index"], item["error"]))
            continue
        log_mel = kaldi_fbank(item["wave"][None])[0].double()
        total += log_mel.sum().item()
        squares += log_mel.square().sum().item()
        cells += log_mel.numel()
        clips += 1
    if not clips:
        reason = f"; the first said: {failed[0][1]}" if failed else ""
        raise UserError(f"none of {len(dataset)} clips could be read, so there are no statistics{reason}")
    mean = total / cells
    std = math.sqrt(max(0.0, squares / cells - mean * mean))
    if not (math.isfinite(mean) and _LEAST_STD < std < math.inf):
        raise UserError(
            f"the log-mel of {clips} clips has mean {mean:g}, std {std:g}, which cannot normalise it; are they silent? "
            "Use clips with sound"
        )
    return Stats(mean, std, clips, failed)
