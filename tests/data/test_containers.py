"""Is the whole sound of a file read? Files that are cut, damaged, joined, or have wrong sizes in their header."""

import os
import struct
import warnings
from contextlib import suppress

import numpy as np
import pytest

from pruneattn.data import load_audio, notices
from pruneattn.errors import UserError

soundfile = pytest.importorskip("soundfile")

LONG, RATE = 30_000, 16_000
#: Formats that store no length: nothing can tell that they are cut.
UNSIZED = {"PAF", "PVF", "IRCAM", "SD2", "XI"}


@pytest.fixture(autouse=True)
def report_again():
    notices.forget()
    yield
    notices.forget()


def tone(samples=LONG, hertz=440.0, channels=1, rate=RATE):
    time = np.arange(samples)[:, None] / rate
    noise = np.random.default_rng(0).standard_normal((samples, channels))
    return 0.4 * np.sin(2 * np.pi * hertz * time) + 0.05 * noise


def write(path, samples, rate=RATE, **options):
    soundfile.write(path, samples, rate, **options)
    return path


def kinds():
    """Every format and coding that the installed libsndfile writes."""
    found = []
    for form in sorted(soundfile.available_formats()):
        for subtype in sorted(soundfile.available_subtypes(form)) if form != "RAW" else ():
            found.append(pytest.param(form, subtype, id=f"{form}-{subtype}"))
    return found


@pytest.mark.parametrize("form, subtype", kinds())
def test_a_cut_file_of_any_format_is_rejected(tmp_path, form, subtype):
    path = tmp_path / f"a.{form.lower()}"
    for rate in (RATE, 8000):
        try:
            write(path, tone(), rate, format=form, subtype=subtype)
            break
        except soundfile.LibsndfileError:
            continue
    else:
        pytest.skip("libsndfile lists this coding but cannot write it")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        whole = len(load_audio(path))
    assert [str(warning.message) for warning in said if "does not contain its length" not in str(warning.message)] == []
    assert len(said) == (form in UNSIZED)
    data = path.read_bytes()
    for tenth in range(1, 10):
        path.write_bytes(data[: len(data) * tenth // 10])
        notices.forget()
        if form in UNSIZED:
            with pytest.warns(UserWarning, match="does not contain its length"):
                assert len(load_audio(path)) < whole
        else:
            with pytest.raises(UserError, match="truncated|cannot be decoded"):
                load_audio(path)


def test_the_message_says_how_much_is_missing(tmp_path):
    path = write(tmp_path / "a.au", tone())
    path.write_bytes(path.read_bytes()[: 24 + 2 * 12_000])
    with pytest.raises(UserError, match=r"a\.au: the file is truncated: 1\.12 of 1\.88 seconds are missing; copy"):
        load_audio(path)


# Joined files ---------------------------------------------------------------------------------------------------------


def options(name):
    if name == "a.opus":
        return dict(format="OGG", subtype="OPUS")
    return dict(format=name[2:].upper(), subtype="PCM_16") if name in ("a.rf64", "a.nist", "a.avr") else {}


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(
    "name", ["a.flac", "a.au", "a.w64", "a.rf64", "a.nist", "a.avr", "a.caf", "a.ogg", "a.opus", "a.mp3"]
)
def test_joined_files_are_read_to_the_end_of_the_last(tmp_path, name, count):
    texts, waves = [], []
    for number in range(count):
        path = write(tmp_path / name, tone(20_001 + 5000 * number, 300 + 200 * number), **options(name))
        texts.append(path.read_bytes())
        waves.append(load_audio(path).numpy())
    path.write_bytes(b"".join(texts))
    np.testing.assert_array_equal(load_audio(path).numpy(), np.concatenate(waves))
    # Enough seconds for a part of the second file.
    np.testing.assert_array_equal(load_audio(path, seconds=1.5), np.concatenate(waves)[:24_000])
    path.write_bytes(b"".join(texts)[: -len(texts[-1]) // 2])
    with pytest.raises(UserError, match="truncated|cannot be decoded"):
        load_audio(path)
    load_audio(path, seconds=0.9)


@pytest.mark.parametrize("name", ["a.wav", "a.aiff"])
def test_joined_files_that_libsndfile_cannot_open_are_rejected(tmp_path, name):
    path = write(tmp_path / name, tone())
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(UserError, match="cannot be decoded"):
        load_audio(path)


def test_joined_files_of_different_rates(tmp_path):
    one, two = write(tmp_path / "1.ogg", tone(20_000)), write(tmp_path / "2.ogg", tone(44_100, rate=44_100), 44_100)
    expected = np.concatenate([load_audio(one), load_audio(two)])
    path = tmp_path / "a.ogg"
    path.write_bytes(one.read_bytes() + two.read_bytes())
    np.testing.assert_array_equal(load_audio(path), expected)


# Ogg ------------------------------------------------------------------------------------------------------------------


def pages(data):
    """Positions of the pages of an Ogg file."""
    found, at = [], 0
    while at < len(data):
        found.append(at)
        segments = data[at + 26]
        at += 27 + segments + sum(data[at + 27 : at + 27 + segments])
    return [*found, len(data)]


@pytest.fixture(params=["VORBIS", "OPUS"])
def ogg(request, tmp_path):
    path = write(tmp_path / "a.ogg", tone(20 * RATE), format="OGG", subtype=request.param)
    assert len(pages(path.read_bytes())) > 6
    return path


def test_an_ogg_file_without_a_page_is_rejected(ogg):
    data = ogg.read_bytes()
    places = pages(data)
    for number in range(2, len(places) - 2):
        ogg.write_bytes(data[: places[number]] + data[places[number + 1] :])
        with pytest.raises(UserError, match=rf"hole: page {number + 1} follows page {number - 1}|cannot be decoded"):
            load_audio(ogg)
    ogg.write_bytes(data[: places[-2]])
    with pytest.raises(UserError, match="truncated: the last page of its stream is missing"):
        load_audio(ogg)


def test_an_ogg_file_with_a_damaged_page_is_rejected(ogg):
    data = ogg.read_bytes()
    middle = pages(data)[4]
    for start, end, message in (
        (60, 61, "checksum of page 4"),
        (0, 200, "are not a page|checksum"),
        (0, 4, "not a page"),
    ):
        hole = bytes(255 - byte for byte in data[middle + start : middle + end])
        ogg.write_bytes(data[: middle + start] + hole + data[middle + end :])
        with pytest.raises(UserError, match=f"the Ogg file is damaged: .*({message})"):
            load_audio(ogg)


def test_damage_behind_the_requested_seconds_is_ignored(ogg):
    data = ogg.read_bytes()
    expected = load_audio(ogg, seconds=2)
    ogg.write_bytes(data[: pages(data)[-2] + 40])
    np.testing.assert_array_equal(load_audio(ogg, seconds=2), expected)
    with pytest.raises(UserError, match="truncated"):
        load_audio(ogg)


# MP3 ------------------------------------------------------------------------------------------------------------------


def tag(length):
    return b"ID3\x04\0\0" + bytes([0, 0, length >> 7, length & 127]) + b"\xff" * length


@pytest.mark.parametrize("rate", [16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_mp3_with_tags(tmp_path, rate, channels):
    path = write(tmp_path / "a.mp3", tone(2 * rate, channels=channels, rate=rate), rate)
    data, wave = path.read_bytes(), load_audio(path).numpy()
    assert len(wave) == 32_000
    path.write_bytes(tag(700) + data + b"TAG" + bytes(125))
    np.testing.assert_array_equal(load_audio(path), wave)
    path.write_bytes(tag(700) + data + b"TAG" + bytes(125) + tag(300) + data)
    np.testing.assert_array_equal(load_audio(path), np.concatenate([wave, wave]))
    path.write_bytes(data[: len(data) // 2] + data[len(data) // 2 + 2000 :])
    with pytest.raises(UserError, match=r"MP3 file is truncated: \d+ of \d+ frames are missing"):
        load_audio(path)


def test_an_mp3_without_a_length_is_decoded_to_its_end_with_a_warning(tmp_path):
    path = write(tmp_path / "a.mp3", tone(2 * RATE), bitrate_mode="CONSTANT")
    data = path.read_bytes()
    start = max(data.find(b"Xing"), data.find(b"Info"))
    assert start > 0
    path.write_bytes(data[:start] + bytes(4) + data[start + 4 :])
    with pytest.warns(UserWarning, match=r"a\.mp3: this MP3 file does not contain its length"):
        assert len(load_audio(path)) == pytest.approx(2 * RATE, abs=3000)
    path.write_bytes(data[:start] + bytes(4) + data[start + 4 :] * 2)
    assert len(load_audio(path)) > 1.9 * 2 * RATE


# Wrong sizes ----------------------------------------------------------------------------------------------------------


def wav(size, outer=None, width=2, rate=RATE):
    """Header of a WAV file; sizes of more than 32 bits wrap, as writers let them."""
    sizes = [struct.pack("<I", number & 0xFFFFFFFF) for number in (36 + size if outer is None else outer, size)]
    fmt = struct.pack("<IHHIIHH", 16, 1, 1, rate, rate * width, width, 8 * width)
    return b"RIFF" + sizes[0] + b"WAVEfmt " + fmt + b"data" + sizes[1]


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000])
@pytest.mark.parametrize("outer", [0, 36, 0xFFFFFFFF])
@pytest.mark.parametrize("subtype, width", [("PCM_U8", 1), ("PCM_16", 2), ("PCM_24", 3), ("PCM_32", 4)])
def test_a_wav_of_unknown_size_is_read_to_its_end(tmp_path, size, outer, subtype, width):
    path = write(tmp_path / "a.wav", tone(), subtype=subtype)
    expected = load_audio(path)
    body = path.read_bytes()[44:]
    path.write_bytes(wav(size, outer, width) + body)
    with pytest.warns(UserWarning, match="does not contain its length"):
        np.testing.assert_array_equal(load_audio(path), expected)


def test_a_wav_without_samples_is_rejected(tmp_path):
    path = tmp_path / "a.wav"
    for rest in (b"", b"LIST" + struct.pack("<I", 4) + b"INFO"):
        path.write_bytes(wav(0, 36 + len(rest)) + rest)
        with pytest.raises(UserError, match="contains no samples"):
            load_audio(path)


@pytest.mark.parametrize("times", [1, 2])
def test_a_wav_above_4_gib_is_read_behind_the_size_in_its_header(tmp_path, times):
    path = tmp_path / "a.wav"
    rate = 768_000
    size = times * 2**32 + 2 * rate
    with open(path, "wb") as file:
        file.write(wav(size, rate=rate))
        file.seek(44 + 2 * 3 * rate)
        file.write(b"\0\x40" * rate)  # the fourth second
        file.truncate(44 + size)
    wave = load_audio(path, seconds=5)  # the header has one second
    assert len(wave) == 5 * RATE
    assert wave[3 * RATE + 200 : 4 * RATE - 200].numpy() == pytest.approx(0.5, abs=1e-3)
    assert abs(wave[: 3 * RATE - 200]).max() < 1e-3 and abs(wave[4 * RATE + 200 :]).max() < 1e-3


def test_the_size_of_a_large_wav_is_its_true_size(tmp_path):
    """3 GB is no size of an unknown length."""
    path = tmp_path / "a.wav"
    with open(path, "wb") as file:
        file.write(wav(3 * 10**9, rate=768_000) + b"\1" * 10**6)
    with pytest.raises(UserError, match="seconds are missing"):
        load_audio(path)


@pytest.mark.parametrize("form", ["W64", "RF64", "CAF", "AU", "AIFF"])
def test_an_absurd_size_is_a_clear_error(tmp_path, form):
    path = write(tmp_path / "a.x", tone(), format=form, subtype="PCM_16")
    data = path.read_bytes()
    for size in (b"\xff" * 7 + b"\x7f", b"\x7f" + b"\xff" * 7, b"\xff" * 7 + b"\x3f"):
        for place in range(4, 120, 4):
            path.write_bytes(data[:place] + size + data[place + 8 :])
            with suppress(UserError):  # other errors are faults
                load_audio(path)


def test_a_size_that_no_file_of_this_length_can_have(tmp_path):
    """libsndfile returns silence for 10**11 samples."""
    path = write(tmp_path / "a.w64", tone(), 8000, format="W64", subtype="GSM610")
    data = path.read_bytes()
    at = data.index(b"data\xf3\xac") + 16
    path.write_bytes(data[:at] + struct.pack("<q", -7722026292521988064) + data[at + 8 :])
    with pytest.raises(UserError, match=r"bytes, but its header announces \d+ samples|truncated"):
        load_audio(path)


# FLAC of unknown length -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1000, 4096, 30_000, 300_001])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_flac_of_unknown_length(tmp_path, samples, channels):
    path = write(tmp_path / "a.flac", tone(samples, channels=channels))
    expected, data = load_audio(path), bytearray(path.read_bytes())
    data[21] &= 0xF0  # the number of samples has 36 bits
    data[22:26] = bytes(4)
    path.write_bytes(data)
    with pytest.warns(UserWarning, match="does not contain its length"):
        np.testing.assert_array_equal(load_audio(path), expected)
    assert len(load_audio(path, seconds=0.05)) == 800
    for tenth in range(1, 10):
        path.write_bytes(data[: len(data) * tenth // 10])
        with pytest.raises(UserError, match="last FLAC frame is incomplete|cannot be decoded"):
            load_audio(path)


# Files that are not regular -------------------------------------------------------------------------------------------


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "a.wav")
    (tmp_path / "b.wav").symlink_to("/dev/zero")
    for path in (tmp_path / "a.wav", tmp_path / "b.wav"):
        with pytest.raises(UserError, match=f"{path}: a pipe, device or socket, not a regular file"):
            load_audio(path)
