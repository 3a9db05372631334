"""Datasets with one folder per class, as ``torchvision.datasets.ImageFolder`` reads them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from .clips import Clip
from .readers import Listing
from .search import (
    Found,
    contains_clip,
    count_sounds,
    count_suffixes,
    is_hidden,
    left_out,
    loose_sounds,
    search_audio,
    visible_folders,
)


def read_folder(root: Path, split: str) -> Listing:
    """Read a folder with one folder per class.

    The class folders are below ``train/``, ``val/`` and ``test/`` if these are splits, see ``_has_splits``. Otherwise
    the split of each file depends on a hash of ``class/file name``: 80 % train, 10 % val, 10 % test. It does not change
    when files are added.

    Every class folder needs a clip. Hidden folders, and folders that operating systems create, are not classes.
    """
    by_folder = _has_splits(root)
    split_root, class_root = (root / split, root / "train") if by_folder else (root, root)
    if not split_root.is_dir():
        raise UserError(
            f"{root} has train/ but no {split}/; add it, or put the class folders directly into {root} "
            "for a split of 80 : 10 : 10"
        )
    labels = visible_folders(class_root)
    for label in labels:
        if label.encode(errors="ignore") != os.fsencode(label):
            raise UserError(
                f"{class_root / label}: the name of the folder is not UTF-8, but labels are text; rename it"
            )
    strangers = {*visible_folders(split_root)} - {*labels}
    if strangers:
        raise UserError(f"{split_root}: class {min(strangers)} has no folder in {class_root}")
    found = {label: search_audio(split_root / label) for label in labels if (split_root / label).is_dir()}
    _reject_empty_classes(class_root, labels, found if split_root == class_root else {})
    clips = [
        Clip(path, (number,))
        for number, label in enumerate(labels)
        for path in (found[label].clips if label in found else ())
        if by_folder or _hash_split(path.relative_to(root).as_posix()) == split
    ]
    notes = _left_out_folders({root, split_root}) + _left_out_clips(root, split_root)
    if found:
        notes += left_out(Found(*([path for paths in kind for path in paths] for kind in zip(*found.values()))))
    return Listing(clips, labels, [], False, notes)


def _hash_split(name: str) -> str:
    place = int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") % 10
    return "test" if place == 9 else "val" if place == 8 else "train"


def _has_splits(root: Path) -> bool:
    """Whether ``train/``, ``val/`` and ``test/`` are splits. Otherwise they are classes with these names.

    They are splits if ``train/`` contains folders and nothing else in ``root`` contains clips, or if in addition to
    other folders there are ``val/`` or ``test/``, and all of them contain class folders and no clips of their own.
    They are classes if ``train/`` is next to other classes and contains its clips itself.
    """
    there = [name for name in ("train", "val", "test") if (root / name).is_dir()]
    if not there:
        return False
    others = [name for name in visible_folders(root) if name not in there and contains_clip(root / name)]
    like_splits = [name for name in there if visible_folders(root / name) and not loose_sounds(root / name)]
    if "train" not in there:
        if others or like_splits != there:
            return False
        raise UserError(
            f"{root}: no train/, so that {_names(there)} with folders inside is ambiguous; for splits, "
            "add train/CLASS; for classes, put the clips directly into the folder of their class"
        )
    if not others:
        if visible_folders(root / "train"):
            return True
        raise UserError(
            f"{root}: train/ is ambiguous: it has no class folders, as a split needs, and no other class next to it; "
            "put the clips of each class into train/CLASS"
        )
    if not visible_folders(root / "train"):
        return False
    if len(there) > 1 and like_splits == there:
        return True
    raise UserError(
        f"{root}: train/ is ambiguous: it contains folders, like a split, but is next to {_names(others)}, like a "
        "class; for splits, use the names train, val and test only; for a class, put the clips of train/ directly into "
        "it"
    )


def _reject_empty_classes(class_root: Path, labels: Sequence[str], found: dict[str, Found]) -> None:
    """Raise a ``UserError`` for classes without a clip, unless all are empty and only name the classes of a test set.

    ``found`` holds the classes that were searched.
    """
    empty = [
        label for label in labels if not (found[label].clips if label in found else contains_clip(class_root / label))
    ]
    if not empty or len(empty) == len(labels):
        return
    reasons = []
    for label in empty:
        unsupported = search_audio(class_root / label).unsupported
        reasons.append(f"{label} ({count_suffixes(unsupported)})" if unsupported else label)
    convert = (
        "; convert files that libsndfile cannot decode to FLAC" if any(" (" in reason for reason in reasons) else ""
    )
    raise UserError(
        f"{class_root}: {_names(reasons, '')} {'has' if len(empty) == 1 else 'have'} no clip, but every folder is a "
        f"class{convert}; add clips, or delete or move the folder"
    )


def _left_out_folders(roots: set[Path]) -> list[str]:
    folders = sorted(
        f"{path}{os.sep}" for root in roots for path in root.iterdir() if path.is_dir() and is_hidden(path.name)
    )
    return (
        [f"left out {_names(folders, '')}: hidden folders and folders of the operating system are no classes"]
        if folders
        else []
    )


def _left_out_clips(root: Path, split_root: Path) -> list[str]:
    """Sentences for clips next to the class folders and, if there are splits, next to these."""
    notes = []
    loose = [path for folder in sorted({root, split_root}) for path in loose_sounds(folder)]
    if loose:
        notes.append(f"left out {count_sounds(loose)} outside of class folders (the first: {loose[0]})")
    if split_root != root:
        names = {*visible_folders(root)} - {"train", "val", "test"}
        others = [f"{root / name}{os.sep}" for name in sorted(names) if contains_clip(root / name)]
        if others:
            notes.append(f"left out {_names(others, '')} next to the splits train/, val/ and test/")
    return notes


def _names(names: Sequence[str], mark: str = "/") -> str:
    shown = [f"{name}{mark}" for name in names[:5]]
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
