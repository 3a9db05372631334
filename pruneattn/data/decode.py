"""Audio files to mono waveforms at one sample rate."""

from __future__ import annotations

import errno
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch

from ..constants import SAMPLE_RATE
from ..errors import UserError

#: Suffixes that ``find_audio`` looks for. libsndfile ignores suffixes and decodes a few more formats.
AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".w64"})

MIN_SECONDS = 0.025  # one analysis window of the filterbank

_BLOCK = 1 << 20  # samples per channel in a block, which is read, mixed down and resampled in one step
_LOWEST_RATE, _HIGHEST_RATE = 100, 768_000  # Hz
_LOUDEST = 1e9  # the squares of much larger samples overflow float32
_MARGIN = 0.25  # seconds read beyond `seconds`, for the resampler's filter
# libsndfile has no field for it, but its log reports a sound chunk that claims more bytes than the file has.
_CHUNK_CUT = re.compile(r"^\s*(?:data|SSND)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
_STREAMED = 0x7FFF0000  # programs that write to a pipe do not know the size and write one near 2^31 or 2^32


def load_audio(
    path: str | os.PathLike[str], sample_rate: int = SAMPLE_RATE, *, seconds: float | None = None
) -> torch.Tensor:
    """Decode an audio file to a mono waveform.

    Any format of libsndfile (wav, flac, ogg, opus, mp3, aiff, ...), any number of channels (averaged) and any sample
    rate (resampled with soxr at very high quality). Full scale is +-1.

    A truncated file is rejected if that can be detected: lossless files have their length in the header, and a
    truncated Ogg file ends inside a page. MP3 has no reliable length, so it is decoded up to its end. A truncation
    after the requested ``seconds`` is not reported.

    Args:
        path: the file.
        sample_rate: rate of the result, Hz.
        seconds: decode only the first seconds; None decodes the whole file.

    Returns:
        float32 tensor ``[L]``, at least 25 ms long.

    Raises:
        UserError: the file does not exist, is empty, truncated, not audio, or shorter than 25 ms, or it has samples
            that are not finite or beyond +-1e9.
    """
    if seconds is not None and not seconds > 0:
        raise ValueError(f"seconds must be positive or None, got {seconds}")
    path = Path(path)
    wave = _decode(path, sample_rate, seconds)
    if seconds is not None:
        wave = wave[: math.ceil(seconds * sample_rate)]
    if len(wave) < int(MIN_SECONDS * sample_rate):
        raise UserError(f"{path}: too short: {1000 * len(wave) / sample_rate:.1f} ms, at least 25 ms are needed")
    return torch.from_numpy(wave)


def find_audio(folder: str | os.PathLike[str], onerror: Callable[[OSError], Any] | None = None) -> list[Path]:
    """Find audio files anywhere below ``folder``, by suffix, in sorted order, without hidden files and folders.

    Links to folders are followed. Each folder is searched once, under its own name if it has one below ``folder``.

    Args:
        folder: the folder.
        onerror: called with the ``OSError`` of each folder that cannot be read, and the search continues. Without it,
            such a folder raises a ``UserError``.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder; use a folder that contains audio files")
    found: list[Path] = []
    searched: set[str] = set()
    tops: list[str | Path] = [folder]
    for top in tops:  # grows by the links that are found
        for parent, folders, files in os.walk(top, onerror=onerror or _reject_folder):
            real = os.path.realpath(parent)
            if real in searched:
                folders.clear()
                continue
            searched.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            tops += [path for name in folders if os.path.islink(path := os.path.join(parent, name))]
            found += [
                Path(parent, name)
                for name in files
                if not name.startswith(".") and Path(name).suffix.lower() in AUDIO_SUFFIXES
            ]
    return sorted(found)


def decoding_error(path: str | os.PathLike[str], error: Exception) -> str:
    """Text of an error of :func:`load_audio` for a list of failed clips; it names the clip."""
    if isinstance(error, (UserError, OSError)):
        return str(error)
    if isinstance(error, MemoryError):
        return f"{path}: not enough memory to decode it"
    return f"{path}: cannot be decoded: {type(error).__name__}: {error}"


def _reject_folder(error: OSError) -> NoReturn:
    raise UserError(
        f"{error.filename}: the folder cannot be read ({error.strerror}); change its permissions, or move it"
    ) from error


def _decode(path: Path, sample_rate: int, seconds: float | None) -> npt.NDArray[np.float32]:
    """Channel mean float32 ``[L]`` of a file at ``sample_rate``: all of it, or as much as ``seconds`` need."""
    import soundfile

    try:
        # Opened here, because libsndfile says "System error" or "not recognised" for every file that it cannot open.
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise UserError(f"{path}: the file is empty; copy or download it again")
        with soundfile.SoundFile(os.fsencode(path)) as sound:
            if not _LOWEST_RATE <= sound.samplerate <= _HIGHEST_RATE:
                raise UserError(f"{path}: a sample rate of {sound.samplerate} Hz is not plausible; correct its header")
            wanted = math.inf if seconds is None else math.ceil((seconds + _MARGIN) * sound.samplerate)
            wave, read, bad = _read_wave(sound, wanted, sample_rate)
            if read < wanted and _is_cut(sound, path):
                raise UserError(f"{path}: the file is truncated; copy or download it again")
    except soundfile.LibsndfileError as error:
        # For text named .mp3 libsndfile says that the file does not exist; its other messages are helpful.
        reason = error.error_string.strip().rstrip(".")
        reason = "" if "does not exist" in reason else f" ({reason})"
        raise UserError(f"{path}: cannot be decoded: not audio, damaged or truncated{reason}") from error
    except OSError as error:
        reasons = {errno.ENOENT: "no such file", errno.EISDIR: "a folder, not an audio file"}
        raise UserError(f"{path}: {reasons.get(error.errno or 0, error.strerror)}") from error
    if read == 0:
        raise UserError(f"{path}: contains no samples")
    if bad:
        raise UserError(f"{path}: {bad} samples are NaN, infinite or beyond +-{_LOUDEST:.0e}; export the clip again")
    return wave


def _read_wave(sound: Any, wanted: float, sample_rate: int) -> tuple[npt.NDArray[np.float32], int, int]:
    """Read the next ``wanted`` samples, or fewer at the end of the file, in blocks at the file's own rate.

    Returns:
        Channel mean at ``sample_rate``, float32 ``[L]``; number of samples read; number of invalid samples.
    """
    resample = _resampler(sound.samplerate, sample_rate)
    wave, read, bad = bytearray(), 0, 0  # grows in place; joining blocks would need twice the memory
    # Not `SoundFile.blocks`: if a file ends before the length in its header, it returns uninitialized memory.
    # A low rate makes the resampled block longer than the block that was read.
    size = max(1, int(_BLOCK * min(1.0, sound.samplerate / sample_rate)))
    while read < wanted:
        block = sound.read(min(wanted - read, size), dtype="float32", always_2d=True)  # [L, channels]
        if len(block) == 0:
            break
        mono = block.mean(axis=1)
        read += len(mono)
        bad += len(mono) - int(np.count_nonzero(np.abs(mono) <= _LOUDEST))
        wave += resample(mono).tobytes()
    wave += resample(np.zeros(0, np.float32), last=True).tobytes()
    return np.frombuffer(wave, np.float32), read, bad


def _resampler(rate: int, sample_rate: int) -> Callable[..., npt.NDArray[np.float32]]:
    """Function of successive blocks of samples, and of ``last``, that returns them at another rate."""
    if rate == sample_rate:
        return lambda mono, last=False: mono
    import soxr

    return soxr.ResampleStream(rate, sample_rate, 1, dtype="float32", quality="VHQ").resample_chunk


def _is_cut(sound: Any, path: Path) -> bool:
    """Whether a file ends before the length in its header."""
    if sound.format == "OGG":
        return _ends_inside_ogg_page(path)
    cut = _CHUNK_CUT.search(sound.extra_info)
    return cut is not None and int(cut[2]) < int(cut[1]) < _STREAMED


def _ends_inside_ogg_page(path: Path) -> bool:
    """Whether an Ogg file ends inside a page.

    A page has a header of 27 bytes, the last of which is the number of segments; their lengths; the segments (RFC
    3533).
    """
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 2 * 65307))  # a page has at most 65307 bytes
        tail = file.read()
    start = tail.rfind(b"OggS\0")
    if start < 0 or len(tail) < start + 27:
        return True
    segments = tail[start + 26]
    lengths = tail[start + 27 : start + 27 + segments]
    return len(lengths) < segments or len(tail) < start + 27 + segments + sum(lengths)
