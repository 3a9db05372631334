"""Folders of classes with junk in them, and classes with the names of splits."""

import logging

import numpy as np
import pytest
import soundfile

from pruneattn.data import load_dataset
from pruneattn.errors import UserError

SPLITS = ("train", "val", "test")


@pytest.fixture
def make(tmp_path):
    """Function that creates files below the dataset folder, which it returns."""

    def make(*names):
        for name in names:
            path = tmp_path / "words" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".wav"):
                soundfile.write(path, np.full(800, 0.1), 16000)
            elif name.endswith("/"):
                path.mkdir(exist_ok=True)
            else:
                path.touch()
        return tmp_path / "words"

    return make


def load(root, split="train"):
    return load_dataset("folder", split, data_dir=root)


def names(root, *splits):
    """Labels, and the files of all splits."""
    sets = [load(root, split) for split in splits]
    assert all(dataset.labels == sets[0].labels for dataset in sets)
    return sets[0].labels, {clip.path.relative_to(root).as_posix() for dataset in sets for clip in dataset.clips}


def takes(folder, number=40):
    """Enough file names for the hash to assign some to each split."""
    return [f"{folder}/{take}.wav" for take in range(number)]


def warnings(caplog):
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


# Classes without a clip


@pytest.mark.parametrize("layout", ["", "train/"])
def test_a_class_without_a_clip_is_rejected(make, layout):
    clips = [*takes(f"{layout}cat"), *takes(f"{layout}dog"), *(["val/cat/x.wav"] if layout else [])]
    root = make(*clips, f"{layout}empty/", f"{layout}text/notes.txt", f"{layout}music/a.m4a", f"{layout}music/b.M4A")
    for split in ("train", "val"):
        with pytest.raises(UserError, match=r"empty, music \(2 .m4a\), text have no clip, but every folder is a class"):
            load(root, split)


def test_many_classes_without_a_clip(make):
    root = make(*takes("cat"), *(f"empty{number}/" for number in range(8)))
    with pytest.raises(UserError, match="empty0, empty1, empty2, empty3, empty4 and 3 more have no clip"):
        load(root)
    root = make(*takes("cat"), "one/")
    for number in range(8):
        (root / f"empty{number}").rmdir()
    with pytest.raises(UserError, match="words: one has no clip, .*add clips, or delete or move the folder"):
        load(root)


def test_class_folders_may_only_name_the_classes_of_a_test_set(make):
    root = make("train/cat/", "train/dog/", "test/cat/a.wav")
    assert names(root, "test") == (["cat", "dog"], {"test/cat/a.wav"})


@pytest.mark.parametrize("layout", ["", "train/"])
def test_folders_of_the_system_are_no_classes(make, caplog, layout):
    clips = [*takes(f"{layout}cat"), *takes(f"{layout}dog")]
    junk = ("__MACOSX/._a.wav.txt", "@eaDir/b.txt", ".cache/c.wav", ".ipynb_checkpoints/", "lost+found/")
    root = make(*clips, *(layout + name for name in junk))
    dataset = load(root)
    assert dataset.labels == ["cat", "dog"]
    (warning,) = warnings(caplog)
    assert (
        warning.startswith("folder: ")
        and "hidden folders and folders of the operating system are no classes" in warning
    )
    assert all(f"{root}/{layout}{name.split('/')[0]}/" in warning for name in junk)


# Sound that is left out


def test_sound_that_cannot_be_decoded_is_counted_once(make, caplog):
    root = make(*takes("cat"), *takes("dog"), "cat/a.m4a", "cat/b.m4a", "dog/c.wma")
    for split in SPLITS:
        assert load(root, split).labels == ["cat", "dog"]
    (warning,) = warnings(caplog)
    assert "left out 3 sound files in formats that libsndfile cannot decode (2 .m4a, 1 .wma; the first: " in warning
    assert str(root / "cat/a.m4a") in warning and "ffmpeg" in warning


def test_sound_outside_of_class_folders_is_counted(make, caplog):
    root = make("train/cat/a.wav", "val/cat/b.wav", "train/loose.wav", "other.flac", "notes.txt")
    load(root)
    (warning,) = warnings(caplog)
    assert f"left out 2 sound files outside of class folders (the first: {root / 'other.flac'})" in warning


def test_a_dataset_without_decodable_sound_says_so(make):
    root = make("cat/a.m4a", "dog/b.m4a", "dog/c.m4a")
    with pytest.raises(UserError, match=r"no clips for split train.*3 sound files .* cannot decode .*3 .m4a.*ffmpeg"):
        load(root)


def test_more_formats_are_clips(make):
    root = make("train/cat/a.wav")
    for suffix in ("aifc", "caf", "voc", "w64"):
        format = {"aifc": "AIFF"}.get(suffix, suffix.upper())
        soundfile.write(root / "train" / "cat" / f"a.{suffix}", np.full(800, 0.1), 16000, format=format)
    dataset = load(root)
    assert [clip.path.suffix for clip in dataset.clips] == [".aifc", ".caf", ".voc", ".w64", ".wav"]
    assert all(item["error"] is None for item in dataset)


# Splits or classes


def test_a_class_named_train(make):
    files = [*takes("train"), *takes("airplane"), *takes("test"), *takes("sea/waves")]
    labels, found = names(make(*files), *SPLITS)
    assert labels == ["airplane", "sea", "test", "train"] and found == {*files}


def test_splits_are_not_classes(make):
    root = make("train/cat/a.wav", "train/dog/b.wav", "test/cat/c.wav", "docs/readme.txt", "empty/")
    assert names(root, "train", "test") == (["cat", "dog"], {"train/cat/a.wav", "train/dog/b.wav", "test/cat/c.wav"})


def test_a_folder_next_to_splits_is_left_out_with_a_warning(make, caplog):
    root = make("train/cat/a.wav", "val/cat/b.wav", "test/cat/c.wav", "unlabeled/d.wav")
    assert names(root, *SPLITS) == (["cat"], {"train/cat/a.wav", "val/cat/b.wav", "test/cat/c.wav"})
    (warning,) = warnings(caplog)
    assert f"left out {root}/unlabeled/ next to the splits" in warning


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["train/monday/a.wav", "bus/b.wav"],
            "train/ is ambiguous: it contains folders, like a split, but is next to bus/",
        ),
        (["train/a.wav", "train/monday/b.wav", "bus/c.wav"], "train/ is ambiguous: it contains folders, like a split"),
        (["train/monday/a.wav", "test/b.wav", "bus/c.wav"], "train/ is ambiguous: .* is next to bus/"),
        (["train/cat/a.wav", "validation/cat/b.wav"], "next to validation/, .*use the names train, val and test only"),
        (["train/a.wav"], "train/ is ambiguous: it has no class folders"),
        (["train/a.wav", "test/b.wav"], "train/ is ambiguous: it has no class folders.*train/CLASS"),
        (["test/cat/a.wav"], "no train/, so that test/ with folders inside is ambiguous"),
        (["val/cat/a.wav", "test/cat/a.wav"], "val/, test/ with folders inside is ambiguous"),
    ],
)
def test_ambiguous_layouts_are_rejected(make, files, message):
    root = make(*files)
    for split in SPLITS:
        with pytest.raises(UserError, match=message):
            load(root, split)
