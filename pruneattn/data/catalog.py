"""Datasets by name: their facts, the locations of their files, and ``load_dataset``."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..constants import AUDIOSET_MEAN, AUDIOSET_STD
from ..errors import UserError, unknown
from . import readers
from .class_folders import read_folder
from .clips import ClipDataset
from .fbank import samples_for
from .toy import ToyDataset

SPLITS = ("train", "val", "test")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DatasetInfo:
    """Facts about a dataset. None if they depend on the files.

    Attributes:
        num_classes: number of classes.
        frames: filterbank frames of the model's input.
        mean: mean of the log-mel of the training set (published with the paper).
        std: its standard deviation.
        multilabel: whether a clip can have several classes.
        metric: ``"map"`` or ``"top1"``.
        splits: the meaning of ``train``, ``val`` and ``test``.
        layout: the expected files, as a tree.
        how_to_get: source of the files.
        markers: relative paths in the folder of the dataset. If one of them exists, the folder is recognized.
        folders: further names of the folder below the data root.
    """

    num_classes: int | None
    frames: int
    mean: float
    std: float
    multilabel: bool | None
    metric: str | None
    splits: str
    layout: str = ""
    how_to_get: str = ""
    markers: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()


# The usual choice for data with unknown statistics.
_AUDIOSET_STATS: Any = {"mean": AUDIOSET_MEAN, "std": AUDIOSET_STD}

DATASETS = {
    "as20k": DatasetInfo(
        num_classes=527,
        frames=1024,
        **_AUDIOSET_STATS,
        multilabel=True,
        metric="map",
        splits="train: balanced train; val and test: eval",
        layout="""\
as20k/
  class_labels_indices.csv           index,mid,display_name
  balanced_train_segments.csv        or an AST-style manifest, train.json
  eval_segments.csv                  or eval.json
  any/folders/YTID.flac              audio files in any format of libsndfile""",
        how_to_get="the CSVs from research.google.com/audioset/download.html; the clips only from YouTube",
        markers=(
            *readers.AUDIOSET_SEGMENTS.values(),
            *readers.AUDIOSET_MANIFESTS["train"],
            *readers.AUDIOSET_MANIFESTS["eval"],
        ),
        folders=("audioset", "AudioSet"),
    ),
    "spc2": DatasetInfo(
        num_classes=35,
        frames=128,
        mean=-6.845978,
        std=5.5654526,
        multilabel=False,
        metric="top1",
        splits="val: validation_list.txt; test: testing_list.txt; train: all other clips",
        layout="""\
spc2/
  validation_list.txt
  testing_list.txt
  backward/ bed/ bird/ ... zero/     35 folders of wav files""",
        how_to_get="pruneattn data fetch spc2 DIR (2.3 GB, CC BY 4.0)",
        markers=("validation_list.txt",),
        folders=("SpeechCommands/speech_commands_v0.02", "speech_commands_v0.02"),
    ),
    "esc50": DatasetInfo(
        num_classes=50,
        frames=512,
        mean=-6.6268077,
        std=5.358466,
        multilabel=False,
        metric="top1",
        splits="val and test: the fold (1 to 5); train: the other four folds",
        layout="""\
esc50/
  meta/esc50.csv                     filename,fold,target,category,...
  audio/1-100032-A-0.wav             2000 wav files""",
        how_to_get="pruneattn data fetch esc50 DIR (0.6 GB, CC BY-NC 3.0)",
        markers=("meta/esc50.csv", "meta/esc10.csv"),
        folders=("ESC-50", "ESC-50-master"),
    ),
    "voxceleb1": DatasetInfo(
        num_classes=1251,
        frames=1024,
        mean=-6.370,
        std=3.074,
        multilabel=False,
        metric="top1",
        splits="the identification split: 1 train, 2 val, 3 test",
        layout="""\
voxceleb1/
  iden_split.txt                     1 id10003/VIDEO/00001.wav
  wav/id10001/VIDEO/00001.wav        also dev/wav and test/wav""",
        how_to_get="on request from www.robots.ox.ac.uk/~vgg/data/voxceleb (38 GB), iden_split.txt from the same page",
        markers=("iden_split.txt", "meta/iden_split.txt"),
        folders=("VoxCeleb1", "voxceleb"),
    ),
    "toy": DatasetInfo(
        num_classes=10,
        frames=128,
        mean=-12.6,
        std=3.6,
        multilabel=False,
        metric="top1",
        splits="2000 train, 400 val, 400 test",
        how_to_get="generated on the fly",
    ),
    "manifest": DatasetInfo(
        num_classes=None,
        frames=1024,
        **_AUDIOSET_STATS,
        multilabel=None,
        metric=None,
        splits="a manifest for each split",
        layout="""\
any.json                             {"data": [{"wav": "audio/a.wav", "labels": "/m/09x0r,/m/05zppz"}, ...]}
class_labels_indices.csv             index,mid,display_name
audio/a.wav                          relative to --data-dir, the manifest's folder or its parent""",
        how_to_get="your own files",
    ),
    "folder": DatasetInfo(
        num_classes=None,
        frames=1024,
        **_AUDIOSET_STATS,
        multilabel=False,
        metric="top1",
        splits="train/ val/ test/ if these contain class folders; else by a hash of the file name, 80 : 10 : 10",
        layout="""\
DIR/
  CLASS/any.wav                      or train/CLASS/any.wav, val/CLASS/any.wav, test/CLASS/any.wav""",
        how_to_get="your own files",
    ),
}

_READERS: dict[str, Callable[..., readers.Listing]] = {
    "as20k": readers.read_audioset,
    "spc2": readers.read_speech_commands,
    "esc50": readers.read_esc50,
    "voxceleb1": readers.read_voxceleb1,
    "folder": read_folder,
}


def load_dataset(
    name: str,
    split: str = "train",
    *,
    data_dir: str | Path | None = None,
    fold: int = 1,
    manifest: str | Path | None = None,
    label_csv: str | Path | None = None,
    multilabel: bool | None = None,
    frames: int | None = None,
    cache: bool = False,
    seed: int = 0,
) -> ClipDataset:
    """Open one split of a dataset.

    Args:
        name: a key of ``DATASETS``.
        split: ``"train"``, ``"val"`` or ``"test"``; ``DATASETS[name].splits`` describes them.
        data_dir: folder of the dataset, or a folder that contains it under its name. None: the environment variable
            PRUNEATTN_DATA.
        fold: ``esc50`` only: the fold to test on, 1 to 5.
        manifest: ``manifest`` and ``as20k`` only: the AST-style JSON file of this split.
        label_csv: ``manifest`` and ``as20k`` only: the label CSV. None: class_labels_indices.csv near the manifest.
        multilabel: ``manifest`` only: whether a clip can have several classes. None: whether a clip of the file has.
        frames: clips are cut to this many filterbank frames. None: ``DATASETS[name].frames``.
        cache: keep the decoded clips in memory, see ``ClipDataset``.
        seed: ``toy`` only: seed of the clips.

    Returns:
        ``ClipDataset``. Listed files that do not exist are left out with a warning, and listed in its ``missing``. A
        warning also counts other sound files that are left out, such as those in formats that cannot be decoded.

    Raises:
        UserError: the data does not exist, or one of its files cannot be used.
    """
    info = dataset_info(name)
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    cut: Any = {"max_samples": samples_for(frames or info.frames), "cache": cache}
    if name == "toy":
        return ToyDataset(split, seed=seed, **cut)
    data_dir = data_dir or os.environ.get("PRUNEATTN_DATA")
    if name == "manifest" and manifest is None:
        raise UserError(f"the dataset 'manifest' needs a manifest for the split {split}. Expected:\n{info.layout}")
    if manifest is not None:
        if name not in ("manifest", "as20k"):
            raise UserError(f"{name} does not read manifests; use --dataset manifest")
        multilabel = info.multilabel if multilabel is None else multilabel
        where: str | Path = manifest
        listing = readers.read_manifest_set(manifest, label_csv=label_csv, root=data_dir, multilabel=multilabel)
    else:
        where = find_root(name, data_dir)
        options: dict[str, Any] = (
            {"fold": fold} if name == "esc50" else {"label_csv": label_csv} if name == "as20k" else {}
        )
        listing = _READERS[name](where, split, **options)
    listed = len(listing.clips) + len(listing.missing)
    if not listing.clips:
        reasons = [f"none of the {listed} listed files exists, the first is {listing.missing[0]}"] if listed else []
        first = "".join(f"; {reason}" for reason in (*reasons, *listing.notes))
        raise UserError(f"{name}: no clips for split {split} in {where}{first}. Expected:\n{info.layout}")
    for note in listing.notes:
        _warn(f"{name}: {note}")
    if listing.missing:
        _log.warning(
            "%s %s: %d of %d clips do not exist and are left out (the first: %s)",
            name,
            split,
            len(listing.missing),
            listed,
            listing.missing[0],
        )
    return ClipDataset(
        name, listing.clips, listing.labels, multilabel=listing.multilabel, missing=listing.missing, **cut
    )


@functools.cache
def _warn(message: str) -> None:
    """Log a warning once, although it applies to each split of a dataset."""
    _log.warning(message)


def dataset_info(name: str) -> DatasetInfo:
    """The ``DatasetInfo`` of a dataset. Raises ``UserError`` for an unknown name."""
    if name not in DATASETS:
        raise unknown("dataset", name, DATASETS)
    return DATASETS[name]


def find_root(name: str, data_dir: str | Path | None) -> Path:
    """The folder of dataset ``name``: ``data_dir`` itself, or the folder below it with the name of the dataset."""
    info = DATASETS[name]
    expected = f"Expected:\n{info.layout}\nHow to get it: {info.how_to_get}"
    if not data_dir:
        raise UserError(
            f"{name}: no data folder; set it with --data-dir or the environment variable PRUNEATTN_DATA. {expected}"
        )
    data_dir = Path(data_dir)
    for folder in (data_dir, *(data_dir / below for below in (name, *info.folders))):
        if folder.is_dir() and (not info.markers or any((folder / marker).is_file() for marker in info.markers)):
            return folder
    reason = "no such folder"
    if info.markers:
        reason = f"no {' or '.join(info.markers[:2])} there or in {data_dir / name}"
    raise UserError(f"{name}: not found in {data_dir}: {reason}. {expected}")
