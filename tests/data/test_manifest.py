import json

import pytest

from pruneattn.data import load_dataset
from pruneattn.data.manifest import read_label_csv, read_manifest
from pruneattn.errors import UserError

CSV = 'index,mid,display_name\n0,/m/a,"Dog, barking"\n1,/m/b,Cat\n2,/m/c,Rain\n'


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "audio").mkdir()
    (tmp_path / "manifests").mkdir()
    for name in ("1.wav", "2.wav", "3.wav"):
        (tmp_path / "audio" / name).touch()
    (tmp_path / "class_labels_indices.csv").write_text(CSV)
    return tmp_path


def write(tree, *entries, text=None):
    path = tree / "manifests" / "train.json"
    data = [{"wav": f"audio/{wav}.wav", "labels": labels} for wav, labels in entries]
    path.write_text(json.dumps({"data": data}, indent=1) if text is None else text)
    return path


def load(path, **options):
    return load_dataset("manifest", "train", manifest=path, **options)


def rejected(path, **options):
    with pytest.raises(UserError) as error:
        load(path, **options)
    return str(error.value)


def test_clips_and_labels(tree, monkeypatch):
    monkeypatch.delenv("PRUNEATTN_DATA", raising=False)
    dataset = load(write(tree, (1, "/m/b"), (2, "/m/a, /m/c"), (3, "/m/c,/m/c")))
    assert dataset.labels == ["Dog, barking", "Cat", "Rain"]
    assert [clip.path for clip in dataset.clips] == [tree / "audio" / f"{i}.wav" for i in (1, 2, 3)]
    assert [clip.labels for clip in dataset.clips] == [(1,), (0, 2), (2,)]
    assert dataset.multilabel and dataset.missing == []


def test_a_dataset_with_one_label_per_clip_is_single_label_by_default(tree):
    path = write(tree, (1, "/m/b"), (2, "/m/a"))
    assert not load(path).multilabel
    assert load(path, multilabel=True).multilabel


def test_folders_of_relative_paths(tree, tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("elsewhere")
    (data_dir / "audio").mkdir()
    (data_dir / "audio" / "1.wav").touch()
    path = write(tree, (1, "/m/b"), (2, "/m/b"))
    assert [clip.path.parents[1] for clip in load(path, data_dir=data_dir).clips] == [data_dir, tree]
    absolute = str(tree / "audio" / "3.wav")
    path.write_text(json.dumps({"data": [{"wav": absolute, "labels": "/m/a"}]}))
    assert str(load(path, data_dir=data_dir).clips[0].path) == absolute


def test_manifest_and_labels_relative_to_the_data_folder(tree, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    write(tree, (1, "/m/b"))
    (tree / "labels.csv").write_text("index,mid,display_name\n0,/m/b,Cow\n")
    dataset = load("manifests/train.json", data_dir=tree, label_csv="labels.csv")
    assert dataset.labels == ["Cow"] and len(dataset.clips) == 1


def test_missing_clips_are_left_out_and_listed(tree, caplog):
    dataset = load(write(tree, (1, "/m/b"), (7, "/m/a"), (2, "/m/a"), (8, "/m/a")))
    assert len(dataset) == 2 and dataset.missing == ["audio/7.wav", "audio/8.wav"]
    assert "2 of 4 clips do not exist and are left out (the first: audio/7.wav)" in caplog.text
    assert "none of the 1 listed files exists, the first is audio/9.wav" in rejected(write(tree, (9, "/m/a")))


@pytest.mark.parametrize("comment", ["// take one", "# take one", "/* take one */"])
def test_comment_line(tree, comment):
    entry = '{"wav": "audio/1.wav", "labels": "/m/a"}'
    text = f'{{"data": [\n{entry},\n  {comment}\n{entry}]}}'
    path = write(tree, text=text)
    assert rejected(path).startswith(f"{path}, line 3: JSON has no comments: remove line 3 ({comment!r})")
    path.write_text(f"{comment}\n" + text.replace(comment, ""))
    assert "line 1: JSON has no comments: remove line 1" in rejected(path)


def test_comment_after_an_entry(tree):
    path = write(tree, text='{"data": [\n{"wav": "audio/1.wav", "labels": "/m/a"} // good\n]}')
    assert "line 2: JSON has no comments: remove the comment in line 2" in rejected(path)


def test_other_json_errors_name_the_line(tree):
    path = write(tree, text='{"data": [\n{"wav": "audio/1.wav" "labels": "/m/a"}]}')
    assert f"{path}, line 2, column 23: not JSON: Expecting ',' delimiter" in rejected(path)


def test_label_that_is_not_in_the_csv(tree):
    message = rejected(write(tree, (1, "/m/a"), (2, "/m/a,/m/zebra")))
    for part in ("train.json", "/m/zebra", "audio/2.wav", "class_labels_indices.csv"):
        assert part in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"data": []}', "lists no clips"),
        ("[]", "not a manifest; expected"),
        ('{"clips": []}', "not a manifest; expected"),
        ('{"data": [{"wav": "1.wav"}]}', 'entry 0 of "data" needs the strings "wav" and "labels"'),
        ('{"data": [{"wav": "audio/1.wav", "labels": " , "}]}', "clip audio/1.wav has no label"),
        ("", "line 1, column 1: not JSON"),
    ],
)
def test_invalid_manifests(tree, text, message):
    assert message in rejected(write(tree, text=text))


def test_missing_files_and_binary_files(tree):
    path = write(tree, (1, "/m/a"))
    assert "no such manifest" in rejected(tree / "absent.json")
    assert "absent.csv: no such label CSV" in rejected(path, label_csv=tree / "absent.csv")
    (tree / "class_labels_indices.csv").unlink()
    assert "no class_labels_indices.csv near" in rejected(path)
    path.write_bytes(b"\xff\xfe\x00")
    (tree / "class_labels_indices.csv").write_text(CSV)
    assert "not a manifest" in rejected(path)
    with pytest.raises(UserError, match="needs a manifest for the split train"):
        load_dataset("manifest")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name\nx\n", "line 1: a label CSV needs the columns"),
        ("index,mid,display_name\n0,/m/a,A\nx,/m/b,B\n", "line 3: expected a number"),
        ("index,mid,display_name\n0,/m/a,A\n1,/m/a,B\n", "line 3: label /m/a or index 1 appears twice"),
        ("index,mid,display_name\n0,/m/a,A\n0,/m/b,B\n", "line 3: label /m/b or index 0 appears twice"),
        ("index,mid,display_name\n0,/m/a,A\n2,/m/b,B\n", "count 0, 1, 2"),
        ("index,mid,display_name\n", "count 0, 1, 2"),
        ("index,mid,display_name\n\N{SUPERSCRIPT TWO},/m/a,A\n", "line 2: expected a number"),
        ("index,mid,display_name\n0,/m/a\n", "line 2: expected a number, a label and a name"),
        pytest.param('index,mid,display_name\n0,/m/a,"' + 200_000 * "x", "line 2: not CSV .field larger", id="long"),
    ],
)
def test_bad_label_csv(tmp_path, text, message):
    (tmp_path / "labels.csv").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_label_csv(tmp_path / "labels.csv")


def test_label_numbers_follow_the_index_column(tmp_path):
    (tmp_path / "labels.csv").write_text("index,mid,display_name\n1,/m/b,B\n0,/m/a,A\n")
    numbers, names = read_label_csv(tmp_path / "labels.csv")
    assert numbers == {"/m/a": 0, "/m/b": 1} and names == ["A", "B"]
    (tmp_path / "m.json").write_text('\ufeff{"data": [{"wav": "x.wav", "labels": "/m/b"}]}', encoding="utf-8")
    clips, missing = read_manifest(tmp_path / "m.json", numbers, "labels.csv", lambda wav: tmp_path / wav)
    assert clips[0].labels == (1,) and missing == []


def test_real_manifests(real_audio):
    folder = real_audio / "speech_commands_ar"
    sizes = {}
    for split in ("train", "val", "test"):
        dataset = load_dataset("manifest", split, manifest=folder / "manifests" / f"asc_{split}_data.json", frames=128)
        sizes[split] = len(dataset)
        assert dataset.num_classes == 40 and not dataset.multilabel and dataset.missing == []
        assert dataset.clips[0].path.parent.name == dataset.labels[dataset.clips[0].labels[0]]
        assert len(dataset[0]["wave"]) == 16000
    assert sizes == {"train": 7200, "val": 2400, "test": 2400}
