import logging
import os
import sys

import numpy as np
import pytest
import soundfile

from pruneattn.data import DATASETS, load_dataset
from pruneattn.data.readers import SPEECH_COMMANDS
from pruneattn.errors import UserError


def sound(path, samples=800):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(samples, 0.1), 16000)


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def listing(dataset):
    """Set of (file name, label names)."""
    return {(clip.path.name, *(dataset.labels[number] for number in clip.labels)) for clip in dataset.clips}


@pytest.fixture(autouse=True)
def no_data_variable(monkeypatch):
    monkeypatch.delenv("PRUNEATTN_DATA", raising=False)


# Speech Commands


@pytest.fixture
def spc2(tmp_path):
    root = tmp_path / "spc2"
    for word in SPEECH_COMMANDS:
        for take in range(3):
            sound(root / word / f"0a_nohash_{take}.wav")
    sound(root / "_background_noise_" / "pink_noise.wav")
    text(root / "LICENSE", "CC BY")
    text(root / "validation_list.txt", "".join(f"{word}/0a_nohash_1.wav\n" for word in SPEECH_COMMANDS))
    text(root / "testing_list.txt", "yes/0a_nohash_2.wav\nbed/0a_nohash_2.wav\n")
    return root


def test_speech_commands(spc2):
    sets = {split: load_dataset("spc2", split, data_dir=spc2) for split in ("train", "val", "test")}
    assert {split: len(dataset) for split, dataset in sets.items()} == {"train": 68, "val": 35, "test": 2}
    assert [(clip.path.parent.name, clip.labels) for clip in sets["test"].clips] == [("bed", (3,)), ("yes", (28,))]
    for dataset in sets.values():
        assert dataset.num_classes == 35 and not dataset.multilabel
        assert all(clip.path.parent.name == dataset.labels[clip.labels[0]] for clip in dataset.clips)
    paths = [{clip.path for clip in dataset.clips} for dataset in sets.values()]
    assert not (paths[0] & paths[1] or paths[0] & paths[2] or paths[1] & paths[2])
    assert len(sets["val"][0]["wave"]) == 800


def test_speech_commands_agree_with_torchaudio(spc2):
    datasets = pytest.importorskip("torchaudio.datasets", exc_type=ImportError)
    (spc2.parent / "SpeechCommands").mkdir()
    spc2.rename(spc2.parent / "SpeechCommands" / "speech_commands_v0.02")
    for split, subset in (("train", "training"), ("val", "validation"), ("test", "testing")):
        theirs = datasets.SPEECHCOMMANDS(spc2.parent, subset=subset)
        ours = load_dataset("spc2", split, data_dir=spc2.parent)
        assert {str(clip.path) for clip in ours.clips} == set(theirs._walker)


def test_speech_commands_with_missing_files(spc2, caplog):
    (spc2 / "yes" / "0a_nohash_2.wav").unlink()
    dataset = load_dataset("spc2", "test", data_dir=spc2)
    assert len(dataset) == 1 and dataset.missing == [str(spc2 / "yes" / "0a_nohash_2.wav")]
    text(spc2 / "testing_list.txt", "zebra/1.wav\n")
    with pytest.raises(UserError, match="zebra/1.wav in the lists is not one of the 35 words"):
        load_dataset("spc2", "test", data_dir=spc2)
    (spc2 / "testing_list.txt").unlink()
    with pytest.raises(UserError, match="testing_list.txt: no such list"):
        load_dataset("spc2", "train", data_dir=spc2)


@pytest.mark.parametrize("form", [".\\{0}\\{1}", "./{0}/{1}", "{0}\\{1}", " {0}//{1}\r", "{0}/../{0}/{1}"])
def test_speech_commands_with_lists_of_other_programs(spc2, form):
    before = {split: load_dataset("spc2", split, data_dir=spc2).clips for split in ("train", "val", "test")}
    for name in ("validation_list.txt", "testing_list.txt"):
        lines = (spc2 / name).read_text().splitlines()
        text(spc2 / name, "".join(form.format(*line.split("/")) + "\n" for line in lines))
    assert {split: load_dataset("spc2", split, data_dir=spc2).clips for split in before} == before


def test_speech_commands_with_lists_that_match_no_file(spc2, caplog):
    text(spc2 / "testing_list.txt", "yes/0a_nohash_2.wav\nbed/0A_NOHASH_2.WAV\nyes/0a_nohash_1\n")
    assert len(load_dataset("spc2", "train", data_dir=spc2)) == 69
    assert "spc2: 2 of 3 entries of " in caplog.text and "bed/0A_NOHASH_2.WAV)" in caplog.text
    for entry in ("/data/yes/0a_nohash_2.wav", "speech_commands/yes/0a_nohash_2.wav", "C:\\yes\\0a_nohash_2.wav"):
        text(spc2 / "testing_list.txt", entry + "\n")
        with pytest.raises(UserError, match="in the lists is not one of the 35 words"):
            load_dataset("spc2", "train", data_dir=spc2)


# ESC-50


@pytest.fixture
def esc50(tmp_path):
    rows = ["filename,fold,target,category,esc10,src_file,take"]
    for fold in range(1, 6):
        for target, category in ((0, "dog"), (10, "rain"), (49, "hand_saw")):
            rows.append(f"{fold}-17-A-{target}.wav,{fold},{target},{category},True,17,A")
            sound(tmp_path / "ESC-50-master" / "audio" / f"{fold}-17-A-{target}.wav")
    text(tmp_path / "ESC-50-master" / "meta" / "esc50.csv", "\n".join(rows) + "\n")
    return tmp_path


@pytest.mark.parametrize("fold", [1, 4])
def test_esc50_folds(esc50, fold):
    sets = {split: load_dataset("esc50", split, data_dir=esc50, fold=fold) for split in ("train", "val", "test")}
    kinds = ((0, "dog"), (10, "rain"), (49, "hand_saw"))
    for split, folds in (("train", {1, 2, 3, 4, 5} - {fold}), ("val", {fold}), ("test", {fold})):
        assert listing(sets[split]) == {(f"{f}-17-A-{t}.wav", name) for f in folds for t, name in kinds}
    assert sets["val"].num_classes == 50 and sets["val"].labels[1] == "class_01"
    assert [clip.labels for clip in sets["val"].clips] == [(0,), (10,), (49,)]


def test_esc50_rejects_invalid_values(esc50):
    with pytest.raises(UserError, match="fold 6: ESC-50 has the folds 1 to 5"):
        load_dataset("esc50", data_dir=esc50, fold=6)
    meta = esc50 / "ESC-50-master" / "meta" / "esc50.csv"
    for row in ("a.wav,1,fifty,dog", "a.wav,1,50,dog", "a.wav,1,-1,dog"):
        text(meta, f"filename,fold,target,category\n{row}\n")
        with pytest.raises(UserError, match="esc50.csv, line 2: expected filename, fold, target"):
            load_dataset("esc50", data_dir=esc50)


def test_real_esc10(real_audio):
    train, test = (load_dataset("esc50", split, data_dir=real_audio / "esc10", fold=1) for split in ("train", "test"))
    assert (len(train), len(test), train.num_classes) == (320, 80, 50)
    for dataset in (train, test):
        targets = [clip.labels[0] for clip in dataset.clips]
        assert sorted(set(targets)) == [0, 1, 10, 11, 12, 20, 21, 38, 40, 41]
        assert all(clip.path.stem.endswith(f"-{target}") for clip, target in zip(dataset.clips, targets))
    assert {clip.path.name[0] for clip in test.clips} == {"1"}
    assert {clip.path.name[0] for clip in train.clips} == {*"2345"}
    assert len(test[0]["wave"]) == 80000 and test.labels[21] == "sneezing"


# VoxCeleb-1


@pytest.mark.parametrize("folders", [("wav", "wav"), ("dev/wav", "test/wav"), (".", ".")])
def test_voxceleb1(tmp_path, folders):
    root = tmp_path / "voxceleb1"
    sound(root / folders[0] / "id10001" / "1zcIwhmdeo4" / "00001.wav")
    sound(root / folders[0] / "id11251" / "s4R4hvqrhFw" / "00009.wav")
    sound(root / folders[1] / "id10270" / "5r0dWxy17C8" / "00002.wav")
    lines = "1 id10001/1zcIwhmdeo4/00001.wav\n2 id11251/s4R4hvqrhFw/00009.wav\n3 id10270/5r0dWxy17C8/00002.wav\n"
    text(root / "iden_split.txt", lines + "1 id10002/absent/00001.wav\n")
    sets = {split: load_dataset("voxceleb1", split, data_dir=tmp_path) for split in ("train", "val", "test")}
    assert [sets[split].clips[0].labels for split in sets] == [(0,), (1250,), (269,)]
    assert all(len(dataset) == 1 and dataset.num_classes == 1251 for dataset in sets.values())
    assert sets["train"].missing == [str(root / folders[0] / "id10002/absent/00001.wav")] and sets["val"].missing == []
    assert sets["test"].labels[269] == "id10270" and sets["test"][0]["error"] is None


def test_voxceleb1_rejects_other_lists(tmp_path):
    text(tmp_path / "iden_split.txt", "1 id10001/a/1.wav\n4 id10001/a/2.wav\n")
    with pytest.raises(UserError, match="iden_split.txt, line 2: expected"):
        load_dataset("voxceleb1", data_dir=tmp_path)


# AudioSet

SEGMENTS = """\
# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids=6, num_segs=6, num_unique_labels=3, num_positive_labels=7
# YTID, start_seconds, end_seconds, positive_labels
--4gqARaEJE, 0.000, 10.000, "/m/a,/m/b"
-0RWZT-miFs, 420.000, 430.000, "/m/c"
Y-plain1234, 30.000, 40.000, "/m/b"
abcdefghijk, 12.500, 22.500, "/m/a"
_nothere_1_, 30.000, 40.000, "/m/a"
milliseconds, 1.234, 11.234, "/m/b"
"""
LABELS = "index,mid,display_name\n0,/m/a,Speech\n1,/m/b,Music\n2,/m/c,Dog\n"


@pytest.fixture
def audioset(tmp_path):
    root = tmp_path / "as20k"
    text(root / "class_labels_indices.csv", LABELS)
    text(root / "balanced_train_segments.csv", SEGMENTS)
    text(root / "eval_segments.csv", '# a\n# b\n# c\nevalevaleva, 0.000, 10.000, "/m/c"\n')
    for name in (
        "balanced/--4gqARaEJE.flac",
        "balanced/-0RWZT-miFs_420.wav",
        "YY-plain1234.wav",
        "other/Yabcdefghijk_12.500_22.500.flac",
        "other/milliseconds_1234_11234.wav",
        "eval/Yevalevaleva.wav",
        "unrelated.wav",
    ):
        sound(root / name)
    return root


def test_audioset_segments(audioset, caplog):
    dataset = load_dataset("as20k", data_dir=audioset)
    assert listing(dataset) == {
        ("--4gqARaEJE.flac", "Speech", "Music"),
        ("-0RWZT-miFs_420.wav", "Dog"),
        ("YY-plain1234.wav", "Music"),
        ("Yabcdefghijk_12.500_22.500.flac", "Speech"),
        ("milliseconds_1234_11234.wav", "Music"),
    }
    assert dataset.missing == ["_nothere_1_"] and dataset.multilabel and dataset.labels == ["Speech", "Music", "Dog"]
    assert "as20k train: 1 of 6 clips do not exist and are left out (the first: _nothere_1_)" in caplog.text
    for split in ("val", "test"):
        assert listing(load_dataset("as20k", split, data_dir=audioset)) == {("Yevalevaleva.wav", "Dog")}


def test_audioset_prefers_a_manifest_to_segments(audioset):
    text(audioset / "train.json", '{"data": [{"wav": "unrelated.wav", "labels": "/m/b"}]}')
    assert listing(load_dataset("as20k", data_dir=audioset)) == {("unrelated.wav", "Music")}
    other = audioset.parent / "mine.json"
    text(other, '{"data": [{"wav": "eval/Yevalevaleva.wav", "labels": "/m/a"}]}')
    dataset = load_dataset("as20k", data_dir=audioset, manifest=other)
    assert listing(dataset) == {("Yevalevaleva.wav", "Speech")} and dataset.multilabel


@pytest.mark.parametrize(
    ("files", "best"),
    [
        (["balanced/{}.flac", "eval/{}.flac", "unbalanced/{}.flac"], "balanced/{}.flac"),
        (["audio/{}.wav", "eval/{}.wav"], "audio/{}.wav"),
        (["balanced_train_segments/{}_0.wav", "eval_segments/{}.wav"], "balanced_train_segments/{}_0.wav"),
        (["bal_train/{}.wav", "unbal_train/{}.wav"], "bal_train/{}.wav"),
        (["{}.flac", "{}.wav"], "{}.flac"),
        (["train/{}.flac", "train/Y{}.wav"], "train/{}.flac"),
    ],
)
def test_audioset_prefers_files_of_the_split(audioset, caplog, files, best):
    """In any order of the paths."""
    ytid = "twicetwice_"
    text(audioset / "balanced_train_segments.csv", f'{ytid}, 0.000, 10.000, "/m/a"\n')
    files, best = [audioset / name.format(ytid) for name in files], audioset / best.format(ytid)
    for path in files:
        sound(path)
    assert [clip.path for clip in load_dataset("as20k", data_dir=audioset).clips] == [best]
    assert "as20k: 1 clip has more than one file" in caplog.text and f"(the first: {best} is used, " in caplog.text
    assert all(str(path) in caplog.text for path in files)
    best.write_bytes(b"damaged")  # then the best of the others
    (clip,) = load_dataset("as20k", data_dir=audioset).clips
    assert clip.path in {*files} - {best}
    for path in files:
        path.write_bytes(b"damaged")
    assert [clip.path for clip in load_dataset("as20k", data_dir=audioset).clips] == [best]


def test_audioset_in_formats_that_cannot_be_decoded(audioset, caplog):
    (audioset / "_nothere_1_.m4a").touch()
    (audioset / "unrelated.m4a").touch()
    assert load_dataset("as20k", data_dir=audioset).missing == ["_nothere_1_"]
    assert (
        "of the missing clips, 1 have a file in a format that libsndfile cannot decode (1 .m4a; the first:"
        in caplog.text
    )


def test_audioset_rejects_invalid_segments(audioset):
    segments = audioset / "balanced_train_segments.csv"
    text(segments, SEGMENTS + 'zzzzzzzzzzz, 0.000, 10.000, "/m/zebra"\n')
    with pytest.raises(UserError, match="line 10: label /m/zebra of clip zzzzzzzzzzz is not in .*indices.csv"):
        load_dataset("as20k", data_dir=audioset)
    text(segments, SEGMENTS + "zzzzzzzzzzz, zero, ten, x\n")
    with pytest.raises(UserError, match="segments.csv, line 10: expected YTID, start_seconds, end_seconds"):
        load_dataset("as20k", data_dir=audioset)
    (audioset / "class_labels_indices.csv").unlink()
    with pytest.raises(UserError, match="class_labels_indices.csv: no such label CSV"):
        load_dataset("as20k", data_dir=audioset)


# Folders


def test_folder_with_splits(tmp_path):
    for name in ("train/dog/a.wav", "train/dog/sub/b.ogg", "train/cat/a.flac", "val/cat/c.wav", "test/dog/d.wav"):
        sound(tmp_path / name)
    (tmp_path / "train" / ".cache").mkdir()
    sets = {split: load_dataset("folder", split, data_dir=tmp_path) for split in ("train", "val", "test")}
    assert listing(sets["train"]) == {("a.wav", "dog"), ("b.ogg", "dog"), ("a.flac", "cat")}
    assert listing(sets["val"]) == {("c.wav", "cat")} and listing(sets["test"]) == {("d.wav", "dog")}
    assert all(dataset.labels == ["cat", "dog"] and not dataset.multilabel for dataset in sets.values())
    sound(tmp_path / "test" / "cow" / "e.wav")
    with pytest.raises(UserError, match="class cow has no folder in"):
        load_dataset("folder", "test", data_dir=tmp_path)


def test_folder_without_a_split(tmp_path):
    sound(tmp_path / "train" / "dog" / "a.wav")
    with pytest.raises(UserError, match="has train/ but no val/; add it"):
        load_dataset("folder", "val", data_dir=tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="file names are not bytes there")
def test_class_folder_whose_name_is_not_utf8(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9")).mkdir()
    with pytest.raises(UserError, match="the name of the folder is not UTF-8.*rename it"):
        load_dataset("folder", data_dir=tmp_path)


def test_folder_is_split_by_file_name(tmp_path):
    for word in ("cat", "dog"):
        (tmp_path / word).mkdir()
        for take in range(150):
            (tmp_path / word / f"{take}.wav").touch()

    def split_all():
        sets = {split: load_dataset("folder", split, data_dir=tmp_path) for split in ("train", "val", "test")}
        return {clip.path: split for split, dataset in sets.items() for clip in dataset.clips}

    before = split_all()
    counts = [list(before.values()).count(split) for split in ("train", "val", "test")]
    assert sum(counts) == 300 and 220 < counts[0] < 260 and min(counts) > 15
    (tmp_path / "cow").mkdir()
    (tmp_path / "cow" / "1.wav").touch()
    after = split_all()
    assert {path: after[path] for path in before} == before


# Properties of all readers


def test_data_folder(spc2, monkeypatch):
    for data_dir in (spc2, spc2.parent, str(spc2)):
        assert len(load_dataset("spc2", "test", data_dir=data_dir)) == 2
    monkeypatch.setenv("PRUNEATTN_DATA", str(spc2.parent))
    assert len(load_dataset("spc2", "test")) == 2


@pytest.mark.parametrize("name", [name for name, info in DATASETS.items() if info.markers] + ["folder"])
def test_missing_data_names_the_expected_files(tmp_path, name):
    with pytest.raises(UserError) as error:
        load_dataset(name)
    assert "--data-dir" in str(error.value) and "PRUNEATTN_DATA" in str(error.value)
    with pytest.raises(UserError) as error:
        load_dataset(name, data_dir=tmp_path / "nowhere")
    for part in (name, str(tmp_path / "nowhere"), DATASETS[name].layout, DATASETS[name].how_to_get):
        assert part in str(error.value)


def test_empty_data(spc2, tmp_path):
    (tmp_path / "none" / "dog").mkdir(parents=True)
    with pytest.raises(UserError, match="folder: no clips for split train in"):
        load_dataset("folder", data_dir=tmp_path / "none")
    text(spc2 / "testing_list.txt", "")
    with pytest.raises(UserError, match="spc2: no clips for split test"):
        load_dataset("spc2", "test", data_dir=spc2)


def test_unknown_names(tmp_path):
    with pytest.raises(UserError, match="unknown dataset .audioset.: choose one of as20k, spc2, esc50"):
        load_dataset("audioset")
    with pytest.raises(UserError, match="unknown split 'eval' .did you mean 'val'..: choose one of train, val, test"):
        load_dataset("toy", "eval")
    with pytest.raises(UserError, match="spc2 does not read manifests; use --dataset manifest"):
        load_dataset("spc2", manifest=tmp_path / "a.json")


def test_long_clips_are_cut_to_the_frames_of_the_dataset(tmp_path, caplog):
    sound(tmp_path / "train" / "dog" / "a.wav", 40000)
    caplog.set_level(logging.WARNING)
    for frames, samples in ((128, 127 * 160 + 400), (None, 40000)):
        assert len(load_dataset("folder", data_dir=tmp_path, frames=frames)[0]["wave"]) == samples
    assert not caplog.records
