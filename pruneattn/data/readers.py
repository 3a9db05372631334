"""One function per folder layout: from files to a ``Listing`` of clips.

``root`` is the folder of the dataset (``catalog`` finds it); ``split`` is train, val or test.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError
from .clips import Clip
from .decode import load_audio
from .manifest import csv_rows, csv_table, here_or_below, list_folders, read_label_csv, read_manifest, read_text
from .search import count_suffixes, search_audio

# The class order of the published Speech Commands classifiers, so that their heads can be used.
SPEECH_COMMANDS = [
    "backward",
    "follow",
    "five",
    "bed",
    "zero",
    "on",
    "learn",
    "two",
    "house",
    "tree",
    "dog",
    "stop",
    "seven",
    "eight",
    "down",
    "six",
    "forward",
    "cat",
    "right",
    "visual",
    "four",
    "wow",
    "no",
    "nine",
    "off",
    "three",
    "left",
    "marvin",
    "yes",
    "up",
    "sheila",
    "happy",
    "bird",
    "go",
    "one",
]

LABEL_CSV = "class_labels_indices.csv"
# Usual file names of AudioSet's balanced training set and evaluation set, in order of preference.
AUDIOSET_MANIFESTS = {
    "train": ("balanced_train_data.json", "balanced_train.json", "train.json"),
    "eval": ("eval_data.json", "eval.json", "test.json"),
}
AUDIOSET_SEGMENTS = {"train": "balanced_train_segments.csv", "eval": "eval_segments.csv"}
# Words in the names of the folders that downloaders make for each part.
_SPLIT_WORDS = {
    "train": {"balanced", "bal", "train", "training"},
    "eval": {"eval", "evaluation", "test", "testing", "val", "valid", "validation"},
    "unbalanced": {"unbalanced", "unbal"},
}


class Listing(NamedTuple):
    """The clips that a reader found."""

    clips: list[Clip]
    labels: list[str]  # display name of each class
    missing: list[str]  # listed files that do not exist
    multilabel: bool
    notes: Sequence[str] = ()  # what was left out for another reason than that it does not exist


def read_manifest_set(
    manifest: str | Path,
    *,
    label_csv: str | Path | None = None,
    root: str | Path | None = None,
    multilabel: bool | None = None,
) -> Listing:
    """Read any AST-style manifest with its label CSV.

    ``manifest`` and ``label_csv`` are relative to the current folder, else to ``root``. Paths in the manifest are
    relative to ``root``, else to the manifest's folder or its parent; without ``label_csv``, these folders are
    searched for a label CSV. ``multilabel=None`` means: whether any clip has two labels.
    """
    manifest = here_or_below(root, manifest)
    bases = list_folders(manifest, root)
    if label_csv is None:
        found = [base / LABEL_CSV for base in bases if (base / LABEL_CSV).is_file()]
        if not found:
            places = ", ".join(str(base) for base in bases)
            raise UserError(f"no {LABEL_CSV} near {manifest} (looked in {places}); set it with --label-csv")
        label_csv = found[0]
    label_csv = here_or_below(root, label_csv)
    numbers, names = read_label_csv(label_csv)

    def find(wav: str) -> Path | None:
        return next((base / wav for base in bases if os.path.isfile(base / wav)), None)

    clips, missing = read_manifest(manifest, numbers, label_csv, find)
    if multilabel is None:
        multilabel = any(len(clip.labels) > 1 for clip in clips)
    return Listing(clips, names, missing, multilabel)


def read_audioset(root: Path, split: str, *, label_csv: str | Path | None = None) -> Listing:
    """Read AudioSet's balanced training set (``train``) or evaluation set (``val`` and ``test``).

    Reads a manifest of ``AUDIOSET_MANIFESTS`` if one exists, else the official segment CSV and the audio files
    anywhere below ``root`` with the name ``YTID``, ``YYTID``, ``YTID_start`` or ``YTID_start_end`` (in seconds or ms).
    """
    part = "train" if split == "train" else "eval"
    label_csv = label_csv or root / LABEL_CSV
    for name in AUDIOSET_MANIFESTS[part]:
        if (root / name).is_file():
            return read_manifest_set(root / name, label_csv=label_csv, root=root, multilabel=True)
    numbers, names = read_label_csv(label_csv)
    segments = root / AUDIOSET_SEGMENTS[part]
    found = search_audio(root)
    files = _by_stem(found.clips)
    unsupported = _by_stem(found.unsupported)
    clips: list[Clip] = []
    missing: list[str] = []
    foreign: list[Path] = []  # in formats that libsndfile cannot decode
    doubles: list[list[Path]] = []  # files of one clip, the one that is used first
    for line, row in csv_rows(segments, "segment list", skipinitialspace=True):
        if row[0].startswith("#"):
            continue
        where = f"{segments}, line {line}"
        try:
            ytid, start, end, mids = row
            stems = _segment_stems(ytid, float(start), float(end))
        except ValueError:
            raise UserError(f'{where}: expected YTID, start_seconds, end_seconds, "labels"') from None
        labels = mids.split(",")
        unknown = [mid for mid in labels if mid not in numbers]
        if unknown:
            raise UserError(f"{where}: label {unknown[0]} of clip {ytid} is not in {label_csv}")
        of_clip = [path for stem in stems for path in files.get(stem, ())]
        if not of_clip:
            missing.append(ytid)
            foreign += [path for stem in stems for path in unsupported.get(stem, ())][:1]
            continue
        if len(of_clip) > 1:
            of_clip = _best_first(of_clip, root, part)
            doubles.append(of_clip)
        clips.append(Clip(of_clip[0], tuple(sorted({numbers[mid] for mid in labels}))))
    return Listing(clips, names, missing, True, _notes(foreign, doubles))


def _by_stem(paths: Iterable[Path]) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for path in paths:
        files.setdefault(path.stem, []).append(path)
    return files


def _best_first(paths: list[Path], root: Path, part: str) -> list[Path]:
    """Order the files of one clip: in a folder of its split first, in one of another split last.

    The first file that can be decoded is moved to the front.
    """

    def distance(path: Path) -> int:
        words = {*re.split(r"[^a-z]+", path.parent.relative_to(root).as_posix().lower())}
        parts = {name for name, known in _SPLIT_WORDS.items() if words & known}
        return 0 if parts == {part} else 2 if parts else 1

    paths = sorted(paths, key=distance)  # stable: then by the form of the file name, then by path
    best = next((number for number, path in enumerate(paths) if _can_decode(path)), 0)
    return [paths.pop(best), *paths]


def _can_decode(path: Path) -> bool:
    try:
        load_audio(path)
    except Exception:  # any error means that another file is better
        return False
    return True


def _notes(foreign: Sequence[Path], doubles: Sequence[Sequence[Path]]) -> list[str]:
    notes = []
    if foreign:
        notes.append(
            f"of the missing clips, {len(foreign)} have a file in a format that libsndfile cannot decode "
            f"({count_suffixes(foreign)}; the first: {foreign[0]}); convert them, for example with: "
            f"ffmpeg -i in{foreign[0].suffix} out.flac"
        )
    if doubles:
        used, *rest = doubles[0]
        have = "clip has" if len(doubles) == 1 else "clips have"
        notes.append(
            f"{len(doubles)} {have} more than one file; files in the folder of the split and files that can be decoded "
            f"are preferred (the first: {used} is used, {', '.join(map(str, rest))} not)"
        )
    return notes


def _segment_stems(ytid: str, start: float, end: float) -> list[str]:
    """The file names that downloaders give to a segment."""
    forms = [(f"{t:g}", f"{t:.1f}", f"{t:.3f}", str(round(1000 * t))) for t in (start, end)]
    times = ["", *(f"_{s}" for s in forms[0]), *(f"_{s}_{e}" for s, e in zip(*forms))]
    return [prefix + ytid + time for prefix in ("", "Y") for time in times]


def read_speech_commands(root: Path, split: str) -> Listing:
    """Read Speech Commands v0.02: validation_list.txt is val, testing_list.txt is test, all other clips are train."""
    listed: dict[str, list[str]] = {}
    notes: list[str] = []
    numbers = {word: number for number, word in enumerate(SPEECH_COMMANDS)}
    there = {f"{word}/{path.name}" for word in SPEECH_COMMANDS for path in (root / word).glob("*.wav")}
    # Both lists are read for each split: a clip that is held out must not be in the training set.
    for part, name in (("val", "validation_list.txt"), ("test", "testing_list.txt")):
        lines = read_text(root / name, "list of clips").splitlines()
        # Lists may be written on Windows, or by `find .`.
        listed[part] = sorted({posixpath.normpath(line.strip().replace("\\", "/")) for line in lines if line.strip()})
        for wav in listed[part]:
            if wav.split("/")[0] not in numbers:
                raise UserError(
                    f"{root}: {wav} in the lists is not one of the 35 words; is this Speech Commands v0.02?"
                )
        absent = [wav for wav in listed[part] if wav not in there]
        if absent and split != part:
            notes.append(
                f"{len(absent)} of {len(listed[part])} entries of {root / name} match no file (the first: {absent[0]})"
            )
    wavs = sorted(there - {*listed["val"], *listed["test"]}) if split == "train" else listed[split]
    entries = [(root / wav, numbers[wav.split("/")[0]]) for wav in wavs]
    return _listing(entries, SPEECH_COMMANDS)._replace(notes=notes)


def read_esc50(root: Path, split: str, *, fold: int = 1) -> Listing:
    """Read ESC-50, or ESC-10 in the same layout: ``fold`` is val and test, the other four folds are train.

    The official protocol has no validation set: the score is the mean over the five folds, each tested with a model
    that was trained on the other four. Both datasets use ESC-50's 50 class numbers.
    """
    if fold not in range(1, 6):
        raise UserError(f"fold {fold}: ESC-50 has the folds 1 to 5")
    meta = _first_file(root, ("meta/esc50.csv", "meta/esc10.csv"))
    labels = [f"class_{number:02d}" for number in range(50)]
    entries = []
    for line, row in csv_table(meta, "list of clips")[1]:
        try:
            target, in_fold = int(row["target"]), int(row["fold"]) == fold
            file = root / "audio" / row["filename"]
            if not 0 <= target < 50:
                raise ValueError
            labels[target] = row["category"]
        except (KeyError, TypeError, ValueError, IndexError):
            where = f"{meta}, line {line}"
            raise UserError(f"{where}: expected filename, fold, target (0 to 49) and category") from None
        if in_fold != (split == "train"):
            entries.append((file, target))
    return _listing(entries, labels)


def read_voxceleb1(root: Path, split: str) -> Listing:
    """Read VoxCeleb-1 with its identification split, 1251 speakers: class ``n`` is speaker ``id(10001 + n)``.

    The ``wav`` folders of the dev and test archives may be merged or separate.
    """
    labels = [f"id{10001 + number}" for number in range(1251)]
    numbers = {speaker: number for number, speaker in enumerate(labels)}
    wanted = {"train": "1", "val": "2", "test": "3"}[split]
    names = ("wav", "dev/wav", "test/wav", "vox1_dev_wav/wav", "vox1_test_wav/wav")
    folders = [root / name for name in names if (root / name).is_dir()] or [root]
    split_file = _first_file(root, ("iden_split.txt", "meta/iden_split.txt"))
    entries = []
    for number, line in enumerate(read_text(split_file, "identification split").splitlines(), 1):
        part, _, wav = line.strip().partition(" ")
        if not part:
            continue
        speaker = wav.split("/")[0]
        if part not in ("1", "2", "3") or speaker not in numbers:
            expected = '"1 id10001/VIDEO/00001.wav" (1 to 3, id10001 to id11251)'
            raise UserError(f"{split_file}, line {number}: expected {expected}")
        if part == wanted:
            file = next((folder / wav for folder in folders if os.path.isfile(folder / wav)), folders[0] / wav)
            entries.append((file, numbers[speaker]))
    return _listing(entries, labels)


def _first_file(root: Path, names: Sequence[str]) -> Path:
    return next((root / name for name in names if (root / name).is_file()), root / names[0])


def _listing(entries: Iterable[tuple[Path, int]], labels: Iterable[str]) -> Listing:
    """Listing of single-label ``(path, class number)`` entries, some of which may not exist."""
    clips: list[Clip] = []
    missing: list[str] = []
    for path, number in entries:
        if os.path.isfile(path):
            clips.append(Clip(path, (number,)))
        else:
            missing.append(str(path))
    return Listing(clips, list(labels), missing, False)
