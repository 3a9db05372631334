"""Which files of a folder are sound, and which of them are left out."""

import errno
import os

import numpy as np
import pytest
import soundfile

from pruneattn.data import find_audio, load_audio, search
from pruneattn.data.search import audio_suffixes, contains_clip, left_out, search_audio, unsupported_suffixes
from pruneattn.errors import UserError


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def names(root, paths):
    return [path.relative_to(root).as_posix() for path in paths]


def test_find_audio(tmp_path):
    touch(tmp_path, "b.WAV", "sub/deep/a.flac", "sub/c.ogg", "notes.txt", ".hidden.wav", ".cache/d.wav")
    assert find_audio(tmp_path) == [tmp_path / "b.WAV", tmp_path / "sub/c.ogg", tmp_path / "sub/deep/a.flac"]
    with pytest.raises(UserError, match="not a folder"):
        find_audio(tmp_path / "notes.txt")


def test_links_to_folders_are_followed_once(tmp_path):
    touch(tmp_path, "disk/deep/a.wav", "disk/b.wav", "set/own/c.wav")
    root = tmp_path / "set"
    for link, target in (("audio", "../disk"), ("again", "own"), ("deep", "../disk/deep"), ("own/loop", "..")):
        (root / link).symlink_to(target)
    assert names(root, find_audio(root)) == ["audio/b.wav", "audio/deep/a.wav", "own/c.wav"]


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    touch(tmp_path, "cat/a.wav", "dog/b.wav")
    scandir = os.scandir

    def deny(path):  # also for root
        if str(path) == str(tmp_path / "dog"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(UserError, match=r"dog: the folder cannot be read \(Permission denied\)"):
        find_audio(tmp_path)
    errors = []
    assert find_audio(tmp_path, onerror=errors.append) == [tmp_path / "cat/a.wav"]
    assert [error.filename for error in errors] == [str(tmp_path / "dog")]


# Suffixes


def test_every_format_of_the_library_has_a_suffix():
    """MATLAB files mostly are no sound, and no table of suffixes can be right for a format of the future."""
    assert set(soundfile.available_formats()) - search._FORMATS.keys() <= {"MAT4", "MAT5", "SDS"}
    usual = ".aif .aifc .aiff .au .caf .flac .mp3 .oga .ogg .opus .rf64 .snd .sph .voc .w64 .wav .wve"
    assert {*usual.split()} <= audio_suffixes()
    assert {*".m4a .aac .wma .mp4 .webm .amr".split()} <= unsupported_suffixes()
    assert not audio_suffixes() & unsupported_suffixes()


def test_a_library_without_a_format(monkeypatch):
    formats = {name: text for name, text in soundfile.available_formats().items() if name != "MP3"}
    monkeypatch.setattr(soundfile, "available_formats", lambda: formats)
    assert ".mp3" not in audio_suffixes.__wrapped__()
    monkeypatch.setattr(search, "audio_suffixes", audio_suffixes.__wrapped__)
    assert ".mp3" in unsupported_suffixes.__wrapped__()


WRITABLE = [name for name in search._FORMATS if name not in ("RAW", "XI")]  # soundfile cannot write these


@pytest.mark.parametrize("name", WRITABLE)
def test_files_of_each_format_are_found_and_decoded(tmp_path, name):
    if name not in soundfile.available_formats():
        pytest.skip("not in this libsndfile")
    wave = 0.3 * np.sin(np.arange(8000) / 9)
    for suffix in search._FORMATS[name]:
        path = tmp_path / f"a{suffix}"
        soundfile.write(path, wave, 8000, format=name)
        assert find_audio(tmp_path) == [path]
        assert len(load_audio(path)) == pytest.approx(16000, abs=4000)  # MP3 pads
        for file in tmp_path.iterdir():  # SD2 has two
            file.unlink()


@pytest.mark.parametrize("suffix", [".gsm", ".vox"])
def test_formats_without_a_header_are_found_and_decoded(tmp_path, suffix):
    subtype = {".gsm": "GSM610", ".vox": "VOX_ADPCM"}[suffix]
    soundfile.write(tmp_path / f"a{suffix}", np.zeros(8000), 8000, format="RAW", subtype=subtype)
    assert len(load_audio(*find_audio(tmp_path))) == pytest.approx(16000, abs=400)


def test_mpeg_layer_2_is_decoded(tmp_path):
    frame = bytes([0xFF, 0xFD, 0x48, 0xC0]) + bytes(284)  # 64 kbit/s, 32 kHz, mono, no bits for any band: silence
    (tmp_path / "a.mp2").write_bytes(frame * 50)
    assert len(load_audio(*find_audio(tmp_path))) == 50 * 1152 // 2


# Files that are left out


def test_sound_that_cannot_be_decoded_is_listed(tmp_path):
    touch(tmp_path, "a.wav", "b.m4a", "c/d.M4A", "c/e.wma", "c/f.txt", "c/g.jpg")
    found = search_audio(tmp_path)
    assert names(tmp_path, found.clips) == ["a.wav"] and found.hidden == []
    assert names(tmp_path, found.unsupported) == ["b.m4a", "c/d.M4A", "c/e.wma"]
    (note,) = left_out(found)
    assert note.startswith(
        "left out 3 sound files in formats that libsndfile cannot decode (2 .m4a, 1 .wma; the first:"
    )
    assert str(tmp_path / "b.m4a") in note and note.endswith("for example with: ffmpeg -i in.m4a out.flac")


def test_hidden_sound_is_listed(tmp_path):
    touch(
        tmp_path, "a.wav", ".b.wav", ".c/d.wav", ".c/.e/f.m4a", "__MACOSX/g.wav", "x/@eaDir/h.wav", "x/#recycle/i.wav"
    )
    touch(tmp_path, "__MACOSX/._a.wav", "._a.wav", ".c/j.txt", "x/k.wav")
    found = search_audio(tmp_path)
    assert names(tmp_path, found.clips) == ["a.wav", "x/k.wav"] and found.unsupported == []
    hidden = [".b.wav", ".c/.e/f.m4a", ".c/d.wav", "__MACOSX/g.wav", "x/#recycle/i.wav", "x/@eaDir/h.wav"]
    assert names(tmp_path, found.hidden) == hidden
    assert left_out(found)[0].startswith("left out 6 sound files with a hidden name or in a hidden folder")


def test_links_to_hidden_sound_are_clips(tmp_path):
    """git-annex and caches keep the files in hidden folders and link to them."""
    touch(tmp_path, ".store/1.wav", ".store/2.wav", ".more/3.wav")
    (tmp_path / "a.wav").symlink_to(tmp_path / ".store/1.wav")
    (tmp_path / "more").symlink_to(tmp_path / ".more")
    found = search_audio(tmp_path)
    assert names(tmp_path, found.clips) == ["a.wav", "more/3.wav"]
    assert names(tmp_path, found.hidden) == [".store/2.wav"]


def test_contains_clip(tmp_path):
    touch(tmp_path, "a/b/c.wav", "d/e.m4a", "f/.g.wav", "h/__MACOSX/i.wav")
    assert [contains_clip(tmp_path / name) for name in "adfh"] == [True, False, False, False]
