"""The clips of a dataset as the analyzed model reads them, batch by batch, and the choice of the clips to show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from tqdm import tqdm

from ..constants import HOP, WINDOW
from ..data import FeatureConfig, FeatureExtractor, make_loader
from ..data.clips import ClipDataset
from ..data.loader import eval_batches
from ..errors import UserError
from ..models.vit import PrunedViT


@dataclass(frozen=True)
class Analysis:
    """An opened checkpoint with the dataset to analyze it on.

    Attributes:
        model: model on ``device``, in eval mode, with features and labels.
        dataset: dataset with the model's classes.
        device: device that the model runs on.
        data: the data in a few words, for titles: name, split and fold.
        batch_size: clips in a batch.
        workers: processes that decode clips; 0 decodes in this process.
        limit: number of clips to analyze, spread evenly over the dataset; None: all.
        failed: ``(path, reason)`` of each clip that could not be read so far. These clips are omitted.
    """

    model: PrunedViT
    dataset: ClipDataset
    device: torch.device
    data: str
    batch_size: int = 32
    workers: int = 0
    limit: int | None = None
    failed: list[tuple[str, str]] = field(default_factory=list)


class Clips(NamedTuple):
    """A batch as the model reads it."""

    fbank: torch.Tensor  # float32 [B, frames, 128], normalized, on the model's device
    sounding: torch.Tensor  # int64 [B]: number of frames that contain sound; the frames after them are padding
    targets: torch.Tensor  # float32 [B, K]
    # int64 [B], each clip's number in the dataset. The name hides the method of tuple.
    index: torch.Tensor  # type: ignore[assignment]


def features_of(model: PrunedViT) -> FeatureConfig:
    """The features of a model's input.

    Raises:
        UserError: the model does not carry them.
    """
    if model.features is None:
        raise UserError(f"{model.name}: the features of its input are unknown; save it with save_pretrained(features=)")
    return model.features


def iterate_clips(analysis: Analysis, text: str) -> Iterator[Clips]:
    """Iterate over the dataset with one batch in memory at a time.

    Clips that cannot be read are omitted and added to ``analysis.failed``.

    Args:
        analysis: model and dataset.
        text: name of the progress bar.

    Raises:
        UserError: no clip can be read.
    """
    model, failed, good = analysis.model, analysis.failed, 0
    features = FeatureExtractor(features_of(model)).to(analysis.device)
    loader = make_loader(
        analysis.dataset, analysis.batch_size, train=False, workers=analysis.workers, limit=analysis.limit
    )
    for batch in tqdm(loader, desc=text, unit="batch", disable=None, leave=False):  # None: no bar without a terminal
        failed += batch.failed
        good += len(batch.index)
        if len(batch.index):
            with torch.inference_mode():
                fbank = features(batch.waves.to(analysis.device, non_blocking=True), batch.lengths)
            sounding = (1 + (batch.lengths - WINDOW) // HOP).clamp(0, model.frames)
            yield Clips(fbank, sounding, batch.targets, batch.index)
    if not good:
        reason = f"; the first is {failed[0][0]}: {failed[0][1]}" if failed else ""
        raise UserError(f"no clip of {analysis.dataset.name} could be read{reason}")


def example_indices(analysis: Analysis, count: int, match: Sequence[str] = ()) -> list[int]:
    """Choose clips to show, spread over the dataset and over the classes.

    The clips are divided into ``count`` consecutive parts. The first clip of each part whose classes have not been
    chosen yet is chosen, or the first clip of the part if there is none.

    Args:
        analysis: model and dataset.
        count: number of clips; fewer are chosen if the dataset has fewer.
        match: choose only clips whose path contains one of these texts; empty: choose from all clips.

    Returns:
        Numbers of the chosen clips in the dataset, ascending.

    Raises:
        UserError: no path contains any of the texts ``match``.
    """
    clips = analysis.dataset.clips
    order = [i for batch in eval_batches(len(clips), analysis.batch_size, limit=analysis.limit) for i in batch]
    if match:
        order = [i for i in order if any(text in str(clips[i].path) for text in match)]
        if not order:
            raise UserError(f"--match {' '.join(match)}: no path of a clip in {analysis.dataset.name} contains this")
    count = min(count, len(order))
    shown: list[int] = []
    seen: set[int] = set()
    for i in range(count):
        part = order[i * len(order) // count : (i + 1) * len(order) // count]
        shown.append(next((clip for clip in part if seen.isdisjoint(clips[clip].labels)), part[0]))
        seen.update(clips[shown[-1]].labels)
    return shown


def describe_data(analysis: Analysis) -> str:
    """The data in a few words, with the number of clips that have been read or, before reading, will be read."""
    total = len(analysis.dataset)
    return f"{analysis.data}, {min(total, analysis.limit or total) - len(analysis.failed)} clips"
