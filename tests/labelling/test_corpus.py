import errno
import importlib
import io
import json
import os
import signal
import sys

import numpy as np
import pytest
import soundfile

from pruneattn.errors import UserError
from pruneattn.labelling import corpus
from pruneattn.labelling.corpus import decode_clips, find_clips


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """``audio/`` with clips of different lengths, ``lists/`` next to it, and another current folder."""
    monkeypatch.delenv("PRUNEATTN_DATA", raising=False)
    for name in ("audio", "lists", "elsewhere"):
        (tmp_path / name).mkdir()
    for number in range(6):
        wave = np.random.default_rng(number).uniform(-0.5, 0.5, 800 * (number + 1))
        soundfile.write(tmp_path / "audio" / f"{number}.wav", wave, 16000)
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def clips_of(tree):
    return [str(tree / "audio" / f"{number}.wav") for number in range(6)]


# Inputs --------------------------------------------------------------------------------------------------------------


def test_files_and_folders_each_clip_once(tree):
    clips = clips_of(tree)
    paths, failed = find_clips([clips[3], tree / "audio", clips[0], tree / "missing.wav", tree / "lists"])
    assert paths == [clips[3], *clips[:3], *clips[4:], str(tree / "missing.wav")]
    assert failed == [(str(tree / "lists"), "this folder contains no audio files")]


def test_a_folder_that_cannot_be_read_is_a_failure(tree, monkeypatch):
    (tree / "audio" / "more").mkdir()
    scandir = os.scandir

    def deny(path):
        if str(path) == str(tree / "audio" / "more"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    paths, failed = find_clips([tree / "audio"])
    assert paths == clips_of(tree) and failed == [(str(tree / "audio" / "more"), "cannot be read: Permission denied")]


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.json", json.dumps({"data": [{"wav": "audio/1.wav", "labels": "/m/x"}, {"wav": "audio/0.wav"}]})),
        ("a.txt", "audio/1.wav\r\n\naudio/0.wav"),
        ("a.csv", '\ufeffkind,path\nx,audio/1.wav\n"two\nlines",audio/0.wav\n'),
    ],
)
def test_lists(tree, name, text):
    clips = clips_of(tree)
    for folder in (tree / "lists", tree):  # paths are relative to the list's folder or its parent
        (folder / name).write_text(text, newline="")
        assert find_clips([folder / name]) == ([clips[1], clips[0]], [])


def test_folders_of_relative_paths(tree):
    other = tree / "other"
    (other / "audio").mkdir(parents=True)
    (other / "audio" / "1.wav").touch()
    absolute = clips_of(tree)[2]
    (tree / "lists" / "a.txt").write_text(f"audio/0.wav\naudio/1.wav\naudio/missing.wav\n{absolute}\n")
    paths, failed = find_clips([tree / "lists" / "a.txt"], data_dir=other)
    assert paths == [
        str(tree / "audio" / "0.wav"),
        str(other / "audio" / "1.wav"),
        str(other / "audio" / "missing.wav"),
        absolute,
    ]
    assert failed == []  # decoding reports that it does not exist
    # The path of the list may refer to that folder, too.
    (other / "b.txt").write_text("audio/1.wav")
    assert find_clips(["b.txt"], data_dir=other) == ([str(other / "audio" / "1.wav")], [])


def test_standard_input(tree, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("0.wav\r\n\nä.wav".encode())))
    monkeypatch.chdir(tree / "audio")
    assert find_clips(["-"]) == (["0.wav", "ä.wav"], [])


def test_sound_that_cannot_be_decoded_is_a_failure(tree):
    for name in ("b.m4a", "a.WMA", "c.txt", "d.jpg"):
        (tree / "audio" / name).touch()
    paths, failed = find_clips([tree / "audio"])
    assert paths == clips_of(tree) and [path for path, _ in failed] == [
        str(tree / "audio" / "a.WMA"),
        str(tree / "audio" / "b.m4a"),
    ]
    assert "cannot decode .m4a files; convert it, for example with: ffmpeg -i in.m4a out.flac" in failed[1][1]
    (tree / "lists" / "only.aac").touch()
    assert [path for path, _ in find_clips([tree / "lists"])[1]] == [str(tree / "lists" / "only.aac")]


def test_hidden_sound_is_reported(tree, caplog):
    (tree / "audio" / "@eaDir").mkdir()
    for name in (".a.wav", "@eaDir/b.wav", "._0.wav"):
        (tree / "audio" / name).touch()
    assert find_clips([tree / "audio"]) == (clips_of(tree), [])
    assert f"{tree / 'audio'}: left out 2 sound files with a hidden name or in a hidden folder" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="file names are not bytes there")
def test_names_of_failures_are_text(tree):
    (tree / "audio" / os.fsdecode(b"\xff.m4a")).touch()
    ((name, _),) = find_clips([tree / "audio"])[1]
    assert name.endswith("\\udcff.m4a")


@pytest.mark.skipif(sys.platform != "linux", reason="file names are not bytes there")
def test_a_name_that_is_not_utf8_is_a_failure(tree):
    (tree / "audio" / os.fsdecode(b"\xff.wav")).touch()
    paths, ((name, reason),) = find_clips([tree / "audio"])
    assert paths == clips_of(tree) and name.endswith("\\udcff.wav") and "not UTF-8" in reason


def test_a_name_that_no_file_can_have_is_a_failure(tree):
    (tree / "a.json").write_text('{"data": [{"wav": "\\ud800.wav"}, {"wav": "audio/0.wav"}]}')
    paths, ((name, reason),) = find_clips([tree / "a.json"])
    assert paths == clips_of(tree)[:1] and name.endswith("\\ud800.wav") and "not UTF-8" in reason


def test_nothing_on_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    with pytest.raises(UserError, match="standard input contains no paths of clips"):
        find_clips(["-"])


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.json", '{"data": [{"labels": "/m/x"}]}', 'entry 0 of "data" needs the strings "wav"; expected'),
        ("a.json", "{", "not JSON"),
        ("a.csv", "file\nx.wav\n", "line 1: .*column named path"),
        ("a.csv", "", "line 1: .*column named path"),
        ("a.csv", "path\n", "a.csv contains no paths of clips"),
        pytest.param("a.csv", 'path\n"' + 200_000 * "x", "line 2: not CSV .field larger .*not closed", id="long"),
        ("a.txt", "", "a.txt contains no paths of clips"),
        ("a.txt", " \n\r\n", "a.txt contains no paths of clips"),
        (
            "a.txt",
            "0.wav\0" + "1.wav\0",
            "a.txt: path 1 contains a NUL byte; write the list as UTF-8 text with one path in",
        ),
        ("a.txt", "0.wav\n".encode("utf-16-le"), "NUL byte"),
        ("a.json", '{"data": [{"wav": "0\\u0000.wav"}]}', "NUL byte"),
        ("a.txt", b"\xff\xfe", "byte 0 is not UTF-8"),
        ("missing.txt", None, "no such list of clips"),
    ],
)
def test_bad_lists(tree, name, text, message):
    if text is not None:
        (tree / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        find_clips([tree / name])


@pytest.mark.parametrize(
    "name, kind",
    [
        ("wav.scp", "a file of Kaldi"),
        ("clips.tsv", "a table with tabs"),
        ("labels.jsonl", "JSON lines"),
        ("clips.NDJSON", "JSON lines"),
        ("clips.lst", "a list of files"),
        ("songs.m3u8", "a list of files"),
        ("clips.yaml", "a structured text file"),
        ("clips.xlsx", "a table"),
        ("clips.parquet", "a table"),
    ],
)
def test_lists_of_other_kinds_are_rejected_by_name(tree, name, kind):
    (tree / "audio" / name).write_text("utt1 0.wav\n")
    with pytest.raises(UserError, match=f"{name}: {kind} .*write the paths of the clips into a .txt .*or a .csv"):
        find_clips([tree / "audio" / "0.wav", tree / "audio" / name])


def test_a_csv_without_commas_names_its_columns(tree):
    (tree / "a.csv").write_text("id\tpath\n1\t0.wav\n")
    with pytest.raises(UserError, match=r"a.csv, line 1: .*column named path, between commas; found 'id.tpath'"):
        find_clips([tree / "a.csv"])


# Decoding in processes -----------------------------------------------------------------------------------------------


def plain(decoded):
    return [(clip.path, None if clip.wave is None else clip.wave.tobytes(), clip.error) for clip in decoded]


def test_results_do_not_depend_on_the_number_of_workers(tree):
    paths = [*clips_of(tree), str(tree / "missing.wav"), *clips_of(tree)]
    expected = plain(decode_clips(paths, 0, ahead=3))
    assert [path for path, _, _ in expected] == paths and expected[6][2].endswith("no such file")
    assert [len(wave) // 4 for _, wave, _ in expected[:6]] == [800 * (number + 1) for number in range(6)]
    assert plain(decode_clips(paths, 3, ahead=3)) == expected


def test_the_number_of_clips_in_flight_is_limited(tree, monkeypatch):
    def most_ahead(ahead):
        taken, most = [], 0
        source = (taken.append(path) or path for path in clips_of(tree) * 4)
        for given, _ in enumerate(decode_clips(source, 1, ahead)):
            most = max(most, len(taken) - given)
        return most

    assert most_ahead(ahead=5) == 5
    monkeypatch.setattr(corpus, "_WAITING", 800 * 6 * 2)  # two of the longest clip
    assert 1 <= most_ahead(ahead=50) < 20  # fewer as clips get longer
    monkeypatch.setattr(corpus, "_WAITING", 10)
    assert most_ahead(ahead=50) == 1


def test_clips_of_killed_processes_are_decoded_again(tree, monkeypatch):
    pools, make = {1: [], 2: []}, corpus._pool
    monkeypatch.setattr(corpus, "_pool", lambda workers: pools[workers].append(make(workers)) or pools[workers][-1])
    paths = clips_of(tree) * 5
    expected = plain(decode_clips(paths, 0, ahead=4))
    found = []
    for number, clip in enumerate(decode_clips(paths, 2, ahead=4)):
        found.append(clip)
        if number in (7, 18):
            for pid in pools[2][-1]._processes:
                os.kill(pid, signal.SIGKILL)
    assert plain(found) == expected
    assert len(pools[2]) == 3, "each kill ends a pool"


DEADLY = """
import os
from pruneattn.labelling import corpus

def decode(path, decode=corpus.decode):
    return os._exit(1) if path.endswith("3.wav") else decode(path)
"""


def test_a_clip_that_crashes_its_process_is_a_failure(tree, monkeypatch):
    """A malicious file could do this with libsndfile."""
    (tree / "deadly.py").write_text(DEADLY)
    monkeypatch.syspath_prepend(tree)
    monkeypatch.setattr(corpus, "decode", importlib.import_module("deadly").decode)
    paths = clips_of(tree) * 2
    found = list(decode_clips(paths, 2, ahead=6))
    assert [clip.path for clip in found] == paths
    assert [clip.error is None for clip in found] == [not path.endswith("3.wav") for path in paths]
    assert "crashed or was killed" in found[3].error


@pytest.mark.parametrize("error", [MemoryError(), ValueError("bad\nheader"), RecursionError("too deep")])
def test_any_error_of_a_clip_is_a_failure_of_this_clip(tree, monkeypatch, error):
    paths, load = clips_of(tree)[:3], corpus.load_audio

    def load_audio(path, **options):
        if path == paths[1]:
            raise error
        return load(path, **options)

    monkeypatch.setattr(corpus, "load_audio", load_audio)
    found = list(decode_clips(paths, 0, ahead=3))
    assert [clip.error is None for clip in found] == [True, False, True]
    assert found[1].error.startswith(f"{paths[1]}: ") and found[1].wave is None
