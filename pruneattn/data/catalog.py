"""The data sets by name: their facts, where their files are looked for, and ``load_dataset``."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from ..constants import AUDIOSET_MEAN, AUDIOSET_STD
from ..errors import UserError
from . import readers
from .clips import ClipDataset
from .fbank import samples_for
from .toy import ToyDataset

SPLITS = ("train", "val", "test")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DatasetInfo:
    """Facts about a data set. None where only the files can tell.

    Attributes:
        num_classes: Number of classes.
        frames: Filterbank frames a model sees of each clip.
        mean: Mean of the log-mel filterbank over the training set (the paper's number).
        std: Its standard deviation.
        multilabel: Whether a clip can have several classes.
        metric: ``"map"`` or ``"top1"``.
        splits: What ``train``, ``val`` and ``test`` are.
        layout: The files that are expected, drawn as a tree.
        how_to_get: Where people get the files.
        markers: One of these, relative to the data set's folder, tells that it is there.
        folders: Other names of the folder below the data root.
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


# Log-mel statistics of AudioSet, the usual choice where a set's own are not known.
_AUDIOSET_STATS = {"mean": AUDIOSET_MEAN, "std": AUDIOSET_STD}

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
  any/folders/YTID.flac              sound files, any of wav flac ogg mp3""",
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
        splits="val: validation_list.txt; test: testing_list.txt; train: the rest",
        layout="""\
spc2/
  validation_list.txt
  testing_list.txt
  backward/ bed/ bird/ ... zero/     35 folders of wav files""",
        how_to_get="python -m pruneattn.data fetch spc2 DIR (2.3 GB, CC BY 4.0)",
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
        splits="val and test: the fold (1 to 5); train: the other four",
        layout="""\
esc50/
  meta/esc50.csv                     filename,fold,target,category,...
  audio/1-100032-A-0.wav             2000 wav files""",
        how_to_get="python -m pruneattn.data fetch esc50 DIR (0.6 GB, CC BY-NC 3.0)",
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
        how_to_get="made on the fly",
    ),
    "manifest": DatasetInfo(
        num_classes=None,
        frames=1024,
        **_AUDIOSET_STATS,
        multilabel=None,
        metric=None,
        splits="a manifest for each",
        layout="""\
any.json                             {"data": [{"wav": "audio/a.wav", "labels": "/m/09x0r,/m/05zppz"}, ...]}
class_labels_indices.csv             index,mid,display_name
audio/a.wav                          from --data-dir, the manifest's folder or that folder's parent""",
        how_to_get="your own files",
    ),
    "folder": DatasetInfo(
        num_classes=None,
        frames=1024,
        **_AUDIOSET_STATS,
        multilabel=False,
        metric="top1",
        splits="train/ val/ test/ where there is a train/; else by a hash of the file name, 80 : 10 : 10",
        layout="""\
DIR/
  CLASS/any.wav                      or train/CLASS/any.wav, val/CLASS/any.wav, test/CLASS/any.wav""",
        how_to_get="your own files",
    ),
}

_READERS = {
    "as20k": readers.read_audioset,
    "spc2": readers.read_speech_commands,
    "esc50": readers.read_esc50,
    "voxceleb1": readers.read_voxceleb1,
    "folder": readers.read_folder,
}


def load_dataset(
    name,
    split="train",
    *,
    data_dir=None,
    fold=1,
    manifest=None,
    label_csv=None,
    multilabel=None,
    frames=None,
    cache=False,
    seed=0,
):
    """Open one split of a data set.

    Args:
        name: A key of ``DATASETS``.
        split: ``"train"``, ``"val"`` or ``"test"``; ``DATASETS[name].splits`` says what these are.
        data_dir: The data set's folder, or one that holds it under its name; else the variable PRUNEATTN_DATA.
        fold: ``esc50`` only: the fold to test on, 1 to 5.
        manifest: ``manifest`` and ``as20k`` only: the AST-style JSON file of this split.
        label_csv: ``manifest`` and ``as20k`` only: the label CSV, else class_labels_indices.csv near the manifest.
        multilabel: ``manifest`` only: whether a clip can have several classes, else as the clips of the file have it.
        frames: Clips are cut to this many filterbank frames; else ``DATASETS[name].frames``.
        cache: Keep the decoded clips in memory, see ``ClipDataset``.
        seed: ``toy`` only: which clips are made.

    Returns:
        ``ClipDataset``. Listed files that are absent are left out, with a warning, and stand in its ``missing``.

    Raises:
        UserError: The data is not there, or a file of it cannot be used.
    """
    info = dataset_info(name)
    if split not in SPLITS:
        raise UserError(f"no split {split!r}; there are {', '.join(SPLITS)}")
    cut = {"max_samples": samples_for(frames or info.frames), "cache": cache}
    if name == "toy":
        return ToyDataset(split, seed=seed, **cut)
    data_dir = data_dir or os.environ.get("PRUNEATTN_DATA")
    if name == "manifest" and manifest is None:
        raise UserError(f"the data set 'manifest' needs a manifest for the split {split}. Expected:\n{info.layout}")
    if manifest is not None:
        if name not in ("manifest", "as20k"):
            raise UserError(f"{name} does not read manifests; use --dataset manifest")
        multilabel = info.multilabel if multilabel is None else multilabel
        where = manifest
        listing = readers.read_manifest_set(manifest, label_csv=label_csv, root=data_dir, multilabel=multilabel)
    else:
        where = find_root(name, data_dir)
        options = {"esc50": {"fold": fold}, "as20k": {"label_csv": label_csv}}.get(name, {})
        listing = _READERS[name](where, split, **options)
    listed = len(listing.clips) + len(listing.missing)
    if not listing.clips:
        first = f"; none of the {listed} listed files is there, the first is {listing.missing[0]}" if listed else ""
        raise UserError(f"{name}: no clips for split {split} in {where}{first}. Expected:\n{info.layout}")
    if listing.missing:
        _log.warning(
            "%s %s: %d of %d clips are missing and left out (the first: %s)",
            name,
            split,
            len(listing.missing),
            listed,
            listing.missing[0],
        )
    return ClipDataset(
        name, listing.clips, listing.labels, multilabel=listing.multilabel, missing=listing.missing, **cut
    )


def dataset_info(name):
    """The ``DatasetInfo`` of a data set's name; ``UserError`` where there is none."""
    if name not in DATASETS:
        raise UserError(f"no data set {name!r}; there are {', '.join(DATASETS)}")
    return DATASETS[name]


def find_root(name, data_dir):
    """The folder of data set ``name``: ``data_dir`` itself, or the one below it that carries the set's name."""
    info = DATASETS[name]
    expected = f"Expected:\n{info.layout}\nHow to get it: {info.how_to_get}"
    if not data_dir:
        raise UserError(f"{name}: no data folder; name it with --data-dir or the variable PRUNEATTN_DATA. {expected}")
    data_dir = Path(data_dir)
    for folder in (data_dir, *(data_dir / below for below in (name, *info.folders))):
        if folder.is_dir() and (not info.markers or any((folder / marker).is_file() for marker in info.markers)):
            return folder
    reason = "no such folder"
    if info.markers:
        reason = f"there is no {' or '.join(info.markers[:2])}, nor in {data_dir / name}"
    raise UserError(f"{name}: not found in {data_dir}: {reason}. {expected}")
