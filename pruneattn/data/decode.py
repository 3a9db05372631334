"""Sound files to mono waveforms at one sample rate."""

import errno
import math
import os
import re
from pathlib import Path

import numpy as np
import torch

from ..constants import SAMPLE_RATE
from ..errors import UserError

#: What ``find_audio`` looks for; libsndfile, which goes by content, decodes a few more kinds.
AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".w64"})

MIN_SECONDS = 0.025  # one analysis window of the filterbank

_BLOCK = 1 << 20  # samples a channel that are held before they are mixed down and resampled
_LOUDEST = 1e9  # the squares of much larger samples are beyond float32
_MARGIN = 0.25  # seconds read beyond `seconds`, so that the resampler's filter sees past the cut
# libsndfile keeps no field for it, but its log notes a sound chunk that promises more bytes than the file has.
_CHUNK_CUT = re.compile(r"^\s*(?:data|SSND)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
_STREAMED = 0x7FFF0000  # writers to a pipe put a size near 2^31 or 2^32: nobody knew the length


def load_audio(path, sample_rate=SAMPLE_RATE, *, seconds=None):
    """Decode a sound file to a mono waveform.

    Any format of libsndfile (wav, flac, ogg, opus, mp3, aiff, ...), channel count (averaged) and rate (resampled with
    soxr, very high quality). Full scale is +-1.

    A file that was cut short is refused where that can be known: lossless files say their length in the header, and
    an Ogg file that ends inside a page was cut. MP3 has no reliable length, so it is decoded as far as it goes.
    A cut behind the ``seconds`` that are wanted does no harm and goes unnoticed.

    Args:
        path: the file.
        sample_rate: rate of the result, Hz.
        seconds: decode only this much from the start; None decodes all.

    Returns:
        float32 tensor ``[L]``, at least 25 ms long.

    Raises:
        UserError: the file is missing, empty, cut short, no sound, shorter than 25 ms, or has samples that are not
            finite or beyond +-1e9.
    """
    if seconds is not None and not seconds > 0:
        raise ValueError(f"seconds must be positive or None, got {seconds}")
    path = Path(path)
    wave = _decode(path, sample_rate, seconds)
    if seconds is not None:
        wave = wave[: math.ceil(seconds * sample_rate)]
    if len(wave) < int(MIN_SECONDS * sample_rate):
        raise UserError(f"{path}: too short: {1000 * len(wave) / sample_rate:.1f} ms, needs at least 25 ms of sound")
    return torch.from_numpy(wave)


def find_audio(folder, onerror=None):
    """Sound files anywhere below ``folder``, by suffix, in sorted order; hidden files and folders are left out.

    Links to folders are followed. Each folder is searched once, under its own name where it has one below ``folder``.

    Args:
        folder: the folder.
        onerror: called with the ``OSError`` of each folder that cannot be read, while the others are searched; without
            it such a folder is a ``UserError``.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder; name one that holds sound files")
    found, searched, tops = [], set(), [folder]
    for top in tops:  # which grow by the links that are met
        for parent, folders, files in os.walk(top, onerror=onerror or _refuse_folder):
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


def _refuse_folder(error):
    raise UserError(
        f"{error.filename}: the folder cannot be read ({error.strerror}); give yourself the right to, or move it away"
    ) from error


def _decode(path, sample_rate, seconds):
    """Channel mean ``[L]`` float32 of a file at ``sample_rate``, whole or as far as ``seconds`` need."""
    import soundfile

    try:
        # Opened here, since libsndfile calls every file that it cannot open "System error" or "not recognised".
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise UserError(f"{path}: the file is empty; copy or download it again")
        with soundfile.SoundFile(os.fsencode(path)) as sound:
            wanted = math.inf if seconds is None else math.ceil((seconds + _MARGIN) * sound.samplerate)
            wave, read, bad = _read_wave(sound, wanted, sample_rate)
            if read < wanted and _is_cut(sound, path):
                raise UserError(f"{path}: the file is cut short; copy or download it again")
    except soundfile.LibsndfileError as error:
        # Of text named .mp3 libsndfile says that it does not exist; its other reasons help.
        reason = error.error_string.strip().rstrip(".")
        reason = "" if "does not exist" in reason else f" ({reason})"
        raise UserError(f"{path}: cannot be decoded: not sound, damaged or cut short{reason}") from error
    except OSError as error:
        reason = {errno.ENOENT: "no such file", errno.EISDIR: "a folder, not a sound file"}
        raise UserError(f"{path}: {reason.get(error.errno, error.strerror)}") from error
    if read == 0:
        raise UserError(f"{path}: holds no sound (0 samples)")
    if bad:
        raise UserError(f"{path}: {bad} samples are NaN, infinite or beyond +-{_LOUDEST:.0e}; export the clip again")
    return wave


def _read_wave(sound, wanted, sample_rate):
    """Read the next ``wanted`` samples, fewer where the file ends, without holding them all at the file's own rate.

    Returns:
        Their channel mean at ``sample_rate``, float32 ``[L]``; how many were read, and how many of these are no sound.
    """
    resample = _resampler(sound.samplerate, sample_rate)
    wave, read, bad = bytearray(), 0, 0  # grows in place, where joining blocks would take the memory twice
    # Not `SoundFile.blocks`: where a file ends before its header says, it hands out memory that was never written.
    while read < wanted:
        block = sound.read(min(wanted - read, _BLOCK), dtype="float32", always_2d=True)  # [L, channels]
        if len(block) == 0:
            break
        mono = block.mean(axis=1)
        read += len(mono)
        bad += len(mono) - np.count_nonzero(np.abs(mono) <= _LOUDEST)
        wave += resample(mono).tobytes()
    wave += resample(np.zeros(0, np.float32), last=True).tobytes()
    return np.frombuffer(wave, np.float32), read, bad


def _resampler(rate, sample_rate):
    """Function of one block of samples after another, and of ``last``, that gives the next ones at another rate."""
    if rate == sample_rate:
        return lambda mono, last=False: mono
    import soxr

    return soxr.ResampleStream(rate, sample_rate, 1, dtype="float32", quality="VHQ").resample_chunk


def _is_cut(sound, path):
    """Whether a file ends before the sound that it promises."""
    if sound.format == "OGG":
        return _ends_inside_ogg_page(path)
    cut = _CHUNK_CUT.search(sound.extra_info)
    return cut is not None and int(cut[2]) < int(cut[1]) < _STREAMED


def _ends_inside_ogg_page(path):
    """An Ogg page: 27 bytes of header, whose last is the number of segments; their lengths; the segments (RFC 3533)."""
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
