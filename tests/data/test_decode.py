import math
import os
import struct
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch

from pruneattn.data import decode, find_audio
from pruneattn.data.decode import load_audio
from pruneattn.errors import UserError

soundfile = pytest.importorskip("soundfile")
soxr = pytest.importorskip("soxr")


def tone(seconds, rate, hertz=440.0):
    return (0.4 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def write(path, samples, rate=16000, **options):
    soundfile.write(path, samples, rate, **options)
    return path


@pytest.mark.parametrize(
    "name, options, error",
    [
        ("a.wav", dict(subtype="PCM_16"), 1 / 32768),
        ("b.wav", dict(subtype="PCM_24"), 2**-23),
        ("c.wav", dict(subtype="FLOAT"), 0.0),
        ("d.flac", dict(), 1 / 32768),
        ("e.aiff", dict(), 1 / 32768),
        ("f.ogg", dict(), 0.02),
        ("g.opus", dict(format="OGG", subtype="OPUS"), 0.05),
    ],
)
def test_formats_give_the_samples_that_were_written(tmp_path, name, options, error):
    wave = load_audio(write(tmp_path / name, tone(1, 16000), **options))
    assert wave.dtype == torch.float32 and wave.shape == (16000,)
    inner = slice(800, -800)  # a lossy codec changes the edges
    np.testing.assert_allclose(wave[inner].numpy(), tone(1, 16000)[inner], rtol=0, atol=error)


def test_mp3_keeps_the_tone(tmp_path):
    wave = load_audio(write(tmp_path / "a.mp3", tone(1, 44100), 44100)).numpy()
    spectrum = np.abs(np.fft.rfft(wave[:16000] * np.hanning(16000)))
    assert abs(len(wave) - 16000) < 1600
    assert spectrum.argmax() == 440  # 1 Hz a bin
    assert spectrum[440] == pytest.approx(0.4 * 16000 / 4, rel=0.05)


def test_channels_are_averaged_and_rates_converted(tmp_path):
    left, right = tone(1, 44100, 440), tone(1, 44100, 1000)
    path = write(tmp_path / "a.wav", np.stack([left, right, 0 * left], axis=1), 44100, subtype="FLOAT")
    wave = load_audio(path).numpy()
    expected = (tone(1, 16000, 440) + tone(1, 16000, 1000)) / 3
    assert wave.shape == expected.shape
    np.testing.assert_allclose(wave[200:-200], expected[200:-200], atol=1e-5)
    assert load_audio(path, sample_rate=44100).shape == (44100,)


def test_resampling_removes_what_would_alias(tmp_path):
    wave = load_audio(write(tmp_path / "a.wav", tone(1, 48000, 9000), 48000, subtype="FLOAT"))
    assert wave[200:-200].abs().max() < 1e-4


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 192000])
def test_resampling_in_blocks_equals_resampling_in_one_piece(tmp_path, monkeypatch, rate):
    monkeypatch.setattr(decode, "_BLOCK", 10000)
    # Less than one block, two blocks, and many blocks with a remainder.
    for samples in (rate // 20, 20000, 2 * rate + 7):
        noise = np.random.default_rng(0).uniform(-1, 1, samples).astype(np.float32)
        wave = load_audio(write(tmp_path / "a.wav", noise, rate, subtype="FLOAT"))
        assert np.array_equal(wave, soxr.resample(noise, rate, 16000, quality="VHQ"))


def test_a_long_clip_needs_the_memory_of_its_result(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "_BLOCK", 10000)
    path = write(tmp_path / "a.wav", np.zeros((96000 * 20, 2)), 96000)
    tracemalloc.start()
    try:
        size = load_audio(path).nbytes
        assert tracemalloc.get_traced_memory()[1] < 1.5 * size
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("rate", [16000, 44100])
def test_seconds_select_the_start_of_the_clip(tmp_path, rate):
    noise = np.random.default_rng(0).uniform(-1, 1, (3 * rate, 2))
    path = write(tmp_path / "a.wav", noise, rate)
    part, whole = load_audio(path, seconds=0.7), load_audio(path)
    assert len(part) == 11200 and len(whole) == 48000
    torch.testing.assert_close(part, whole[:11200], rtol=0, atol=1e-6)
    torch.testing.assert_close(load_audio(path, seconds=60), whole, rtol=0, atol=0)


def test_seconds_limit_the_decoded_samples(tmp_path, monkeypatch):
    path = write(tmp_path / "a.wav", np.zeros(16000 * 60))
    read = []
    original = soundfile.SoundFile.read

    def spy(self, *args, **options):
        block = original(self, *args, **options)
        read.append(len(block))
        return block

    monkeypatch.setattr(soundfile.SoundFile, "read", spy)
    load_audio(path, seconds=2)
    assert 32000 <= sum(read) < 48000


def test_files_without_audio_are_rejected(tmp_path):
    def reject(path, message):
        with pytest.raises(UserError, match=message) as caught:
            load_audio(path)
        assert str(path) in str(caught.value)

    reject(tmp_path / "missing.wav", "no such file")
    reject(tmp_path, "a folder")
    (tmp_path / "empty.wav").touch()
    reject(tmp_path / "empty.wav", "empty")
    for name in ("text.wav", "text.mp3"):
        (tmp_path / name).write_text("this is not sound\n" * 100)
        reject(tmp_path / name, "cannot be decoded: not audio, damaged or truncated")
    (tmp_path / "noise.ogg").write_bytes(np.random.default_rng(0).bytes(5000))
    reject(tmp_path / "noise.ogg", "cannot be decoded")
    reject(write(tmp_path / "none.wav", np.zeros(0)), "contains no samples")
    reject(write(tmp_path / "10ms.wav", tone(0.010, 16000)), r"too short: 10\.0 ms, at least 25 ms are needed")
    broken = tone(1, 16000)
    broken[[3, 70]] = np.nan, np.inf
    reject(write(tmp_path / "nan.wav", broken, subtype="FLOAT"), "2 samples are NaN")
    broken[[3, 70]] = 1e18, -2e9
    reject(write(tmp_path / "huge.wav", broken, subtype="FLOAT"), r"2 samples are .* beyond \+-1e\+09; export")


def test_shortest_clip(tmp_path):
    assert len(load_audio(write(tmp_path / "a.wav", tone(1, 16000)[:400]))) == 400
    with pytest.raises(UserError, match="too short"):
        load_audio(write(tmp_path / "b.wav", tone(1, 16000)[:399]))


@pytest.mark.parametrize("share", [0.999, 0.6, 0.2])
@pytest.mark.parametrize("name", ["a.wav", "b.wav", "c.flac", "d.aiff", "e.ogg", "f.opus", "g.mp3"])
def test_truncated_files_are_rejected(tmp_path, name, share):
    subtypes = {"a.wav": "FLOAT", "b.wav": "PCM_24", "f.opus": "OPUS"}
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (48000, 2))
    path = write(tmp_path / name, noise, 48000, format="OGG" if name == "f.opus" else None, subtype=subtypes.get(name))
    load_audio(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match="truncated|cannot be decoded"):
        load_audio(path)


def test_a_truncation_after_the_requested_part_is_ignored(tmp_path):
    path = write(tmp_path / "a.wav", tone(10, 16000))
    path.write_bytes(path.read_bytes()[:-1000])
    assert len(load_audio(path, seconds=5)) == 80000
    with pytest.raises(UserError, match="truncated"):
        load_audio(path, seconds=10)


@pytest.mark.parametrize("size", [b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x00\xf0\xff\x7f"])
def test_a_wav_written_to_a_pipe_is_whole(tmp_path, size):
    """The header contains a huge length, because the writer did not know the length."""
    path = write(tmp_path / "a.wav", tone(1, 16000))
    data = path.read_bytes()
    at = data.index(b"data")
    path.write_bytes(data[:4] + size + data[8 : at + 4] + size + data[at + 8 :])
    assert len(load_audio(path)) == 16000


def test_bytes_after_the_sound_are_ignored(tmp_path):
    for name in ("a.wav", "b.ogg"):
        path = write(tmp_path / name, tone(1, 16000))
        path.write_bytes(path.read_bytes() + b"TAG" + bytes(125))
        assert len(load_audio(path)) == 16000


@pytest.mark.skipif(sys.platform != "linux", reason="file names are not bytes there")
def test_a_name_that_is_not_utf8(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.wav")
    write(tmp_path / "a.wav", tone(1, 16000)).rename(path)
    assert len(load_audio(path)) == 16000


def test_seconds_must_be_positive(tmp_path):
    for seconds in (0, -1, math.nan):
        with pytest.raises(ValueError, match="seconds"):
            load_audio(tmp_path / "a.wav", seconds=seconds)


@pytest.mark.parametrize("name", ["notes.au", "notes.snd"])
def test_text_is_not_decoded_as_samples(tmp_path, name):
    path = tmp_path / name
    path.write_text("These are no samples. " * 1000)
    with pytest.raises(UserError, match=f"{name}: cannot be decoded: it has no header of a sound file"):
        load_audio(path)


def test_sound_in_a_foreign_format_is_named(tmp_path):
    path = tmp_path / "song.m4a"
    path.write_bytes(b"\0\0\0\x20ftypM4A " + bytes(1000))
    with pytest.raises(UserError, match=r"song.m4a: libsndfile cannot decode .m4a files; convert it"):
        load_audio(path)


def test_real_clips(real_audio):
    esc = sorted((real_audio / "esc10").rglob("*.flac"))[0]
    words = find_audio(real_audio / "speech_commands_ar")[:20]
    assert load_audio(esc).shape == (80000,)
    assert all(len(load_audio(path)) == 16000 and load_audio(path).abs().max() > 0.01 for path in words)


@pytest.mark.parametrize("rate", [1, 99, 768_001, 2**31 - 1])
def test_implausible_sample_rates_are_rejected(tmp_path, rate):
    """At 1 Hz, these 720 kB would become tens of GB."""
    sound = bytes(range(240)) * 3000
    header = b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, rate, rate, 1, 8) + b"data" + struct.pack("<I", len(sound))
    path = tmp_path / "clip.wav"
    path.write_bytes(b"RIFF" + struct.pack("<I", len(header) + len(sound)) + header + sound)
    with pytest.raises(UserError, match=f"clip.wav: a sample rate of {rate} Hz is not plausible"):
        load_audio(path)


def test_low_rates_are_resampled_in_small_blocks(tmp_path, monkeypatch):
    path = write(tmp_path / "low.wav", tone(30, 100, 20), rate=100)
    read, original = [], soundfile.SoundFile.read

    def spy(self, frames, **options):
        read.append(frames)
        return original(self, frames, **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", spy)
    assert len(load_audio(path)) == pytest.approx(30 * 16000, abs=320)
    assert max(read) <= (1 << 20) * 100 // 16000


MEASURED = """
import resource, sys
from pruneattn.data import load_audio

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

load_audio(sys.argv[1], seconds=1)
before = peak()
wave = load_audio(sys.argv[1], seconds=float(sys.argv[2]))
print(len(wave), peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="units of ru_maxrss, sparse files")
@pytest.mark.parametrize("rate, channels", [(100, 1), (8000, 1), (8000, 60), (44100, 2), (768_000, 1)])
@pytest.mark.parametrize("seconds", [10, 600])
def test_the_memory_of_decoding_is_that_of_the_result(tmp_path, rate, channels, seconds):
    """260 MB an hour, and for the start of a clip the memory of the start."""
    path = tmp_path / "a.wav"
    size = rate * channels * 600
    chunk = b"data" + struct.pack("<I", size)
    header = b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, channels, rate, rate * channels, channels, 8) + chunk
    with open(path, "wb") as file:
        file.write(b"RIFF" + struct.pack("<I", len(header) + size) + header)
        file.truncate(8 + len(header) + size)
    command = [sys.executable, "-c", MEASURED, str(path), str(seconds)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    samples, used = map(int, printed.split())
    assert samples == seconds * 16_000
    assert used < 4 * samples + 30e6
