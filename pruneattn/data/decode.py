"""Audio files to mono waveforms at one sample rate."""

from __future__ import annotations

import errno
import math
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from ..constants import SAMPLE_RATE
from ..errors import UserError
from . import containers
from .containers.parts import Incomplete, Part, PartFile
from .levels import Levels
from .notices import say_once
from .search import unsupported_reason, unsupported_suffixes

MIN_SECONDS = 0.025  # one analysis window of the filterbank

_BLOCK = 1 << 19  # samples in a block, which is read, mixed down and resampled in one step
_LOWEST_RATE, _HIGHEST_RATE = 100, 768_000  # Hz
_HEADERLESS = (".gsm", ".vox")  # libsndfile takes any other file named .au or .snd without a header for u-law samples
_MARGIN = 0.25  # seconds read beyond `seconds`, for the resampler's filter


def load_audio(
    path: str | os.PathLike[str], sample_rate: int = SAMPLE_RATE, *, seconds: float | None = None
) -> torch.Tensor:
    """Decode an audio file to a mono waveform.

    Any format of libsndfile (wav, flac, ogg, opus, mp3, aiff, ...), any number of channels (averaged) and any sample
    rate (resampled with soxr at very high quality). Full scale is +-1. Ogg, MP3, FLAC and WAV files that were joined
    are decoded up to the end of the last.

    A file from which a part is missing is rejected: the length in the header is compared with the file and with the
    decoded samples, the pages of Ogg are checked, and the frames of MP3 are counted. A truncation after the requested
    ``seconds`` is not reported. A few formats have no length (PAF, PVF, IRCAM, SD2, MP3 without a Xing header, files
    written to a pipe); they are decoded up to their end, and the first one is reported in a warning.

    Args:
        path: the file.
        sample_rate: rate of the result, Hz.
        seconds: decode only the first seconds; None decodes the whole file.

    Returns:
        float32 tensor ``[L]``, at least 25 ms long.

    Raises:
        UserError: the file does not exist, is not a regular file, is empty, truncated, damaged, not audio, or shorter
            than 25 ms, or it has samples that are not finite or beyond +-1e9.
    """
    blocks = stream_audio(path, sample_rate, seconds=seconds)
    first, second = next(blocks), next(blocks, None)
    if second is None:
        return torch.from_numpy(first)
    wave = bytearray(first.data)  # grows in place; joining blocks would need twice the memory
    wave += second.data
    for block in blocks:
        wave += block.data
    return torch.frombuffer(wave, dtype=torch.float32)


def stream_audio(
    path: str | os.PathLike[str], sample_rate: int = SAMPLE_RATE, *, seconds: float | None = None
) -> Iterator[npt.NDArray[np.float32]]:
    """Decode an audio file to blocks of a mono waveform, which :func:`load_audio` joins.

    It needs the memory of one block. An error can be raised after any number of blocks.

    Yields:
        float32 array ``[L]``, not empty.
    """
    if seconds is not None and not seconds > 0:
        raise ValueError(f"seconds must be positive or None, got {seconds}")
    import soundfile

    most = math.inf if seconds is None else math.ceil(seconds * sample_rate)
    given, levels = 0, Levels()
    try:
        with _open_file(path) as file:
            for block in _blocks(path, file, sample_rate, seconds, levels):
                block = block[: int(min(len(block), most - given))]
                given += len(block)
                if len(block):
                    yield block
                if given >= most:
                    break
    except Incomplete as error:
        raise UserError(f"{path}: {error}; copy or download it again") from error
    except soundfile.LibsndfileError as error:
        if Path(path).suffix.lower() in unsupported_suffixes():
            raise UserError(f"{path}: {unsupported_reason(Path(path))}") from error
        # For text named .mp3 libsndfile says that the file does not exist; its other messages are helpful.
        reason = error.error_string.strip().rstrip(".")
        reason = "" if "does not exist" in reason else f" ({reason})"
        raise UserError(f"{path}: cannot be decoded: not audio, damaged or truncated{reason}") from error
    except OSError as error:
        reasons = {errno.ENOENT: "no such file", errno.EISDIR: "a folder, not an audio file"}
        raise UserError(f"{path}: {reasons.get(error.errno or 0, error.strerror)}") from error
    if levels.read == 0:
        raise UserError(f"{path}: contains no samples")
    levels.check(path)
    if given < int(MIN_SECONDS * sample_rate):
        raise UserError(f"{path}: too short: {1000 * given / sample_rate:.1f} ms, at least 25 ms are needed")


def decoding_error(path: str | os.PathLike[str], error: Exception) -> str:
    """Text of an error of :func:`load_audio` for a list of failed clips; it names the clip."""
    if isinstance(error, (UserError, OSError)):
        return str(error)
    if isinstance(error, MemoryError):
        return f"{path}: not enough memory to decode it"
    return f"{path}: cannot be decoded: {type(error).__name__}: {error}"


def _open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file that is not empty. Other files can block forever or have no end."""
    # Opened here, because libsndfile says "System error" or "not recognised" for every file that it cannot open.
    file = open(path, "rb", opener=_open_without_waiting)  # noqa: SIM115, closed by the caller
    status = os.fstat(file.fileno())
    if stat.S_ISREG(status.st_mode) and status.st_size > 0:
        return file
    file.close()
    if stat.S_ISREG(status.st_mode):
        raise UserError(f"{path}: the file is empty; copy or download it again")
    raise UserError(f"{path}: a pipe, device or socket, not a regular file; write the sound to a file first")


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # the open of a pipe waits for a writer without it


def _blocks(
    path: str | os.PathLike[str], file: BinaryIO, sample_rate: int, seconds: float | None, levels: Levels
) -> Iterator[npt.NDArray[np.float32]]:
    """Channel mean of all sounds in a file at ``sample_rate``, a little longer than ``seconds``."""
    size = os.fstat(file.fileno()).st_size
    with _open_sound(os.fsencode(path)) as whole:
        if whole.format == "RAW" and Path(path).suffix.lower() not in _HEADERLESS:
            raise UserError(f"{path}: cannot be decoded: it has no header of a sound file")
        left = math.inf if seconds is None else seconds + _MARGIN
        for part in containers.parts(file, size, whole, seconds):
            with _open_part(file, part, size, whole) as sound:
                if not _LOWEST_RATE <= sound.samplerate <= _HIGHEST_RATE:
                    raise UserError(
                        f"{path}: a sample rate of {sound.samplerate} Hz is not plausible; correct its header"
                    )
                wanted = left if left == math.inf else math.ceil(left * sound.samplerate)
                before = levels.read
                yield from _read_wave(sound, wanted, sample_rate, levels)
                read = levels.read - before
                if read >= wanted:
                    return
                _check_whole(part, read, sound.samplerate)
                if not part.sized:
                    say_once(
                        "length",
                        f"{path}: this {whole.format} file does not contain its length, so that a truncation cannot be "
                        "detected (this is reported once)",
                    )
                left -= read / sound.samplerate


def _check_whole(part: Part, read: int, rate: int) -> None:
    if read < part.frames:
        seconds = (part.frames - read) / rate
        raise Incomplete(f"the file is truncated: {seconds:.3g} of {part.frames / rate:.3g} seconds are missing")
    if part.missing:
        raise Incomplete(f"the file is truncated: {part.missing} bytes of its sound are missing")


def _open_part(file: BinaryIO, part: Part, size: int, whole: Any) -> AbstractContextManager[Any]:
    """Open a part of a file as a sound of its own."""
    if part.raw:
        kind = dict(samplerate=whole.samplerate, channels=whole.channels, subtype=whole.subtype, endian=part.raw)
        return _open_sound(PartFile(file, part), format="RAW", **kind)
    if (part.start, part.end, part.head) == (0, size, b""):
        return nullcontext(whole)
    return _open_sound(PartFile(file, part))


def _open_sound(file: Any, **options: Any) -> Any:
    """A ``soundfile.SoundFile`` that is only read forward."""
    return _forward_file()(file, **options)


@lru_cache(maxsize=1)
def _forward_file() -> Any:
    import soundfile

    class ForwardFile(soundfile.SoundFile):
        def seekable(self) -> bool:
            # Otherwise soundfile seeks after each block, which fails at the end of FLAC files without a length.
            return False

    return ForwardFile


def _read_wave(sound: Any, wanted: float, sample_rate: int, levels: Levels) -> Iterator[npt.NDArray[np.float32]]:
    """Read ``wanted`` samples, or fewer at the end of the file, and yield their channel mean at ``sample_rate``."""
    resample = _resampler(sound.samplerate, sample_rate)
    read = 0
    # A low rate makes the resampled block longer than the block that was read.
    size = max(1, int(_BLOCK * min(1.0, sound.samplerate / sample_rate)) // sound.channels)
    # Behind the last sample there may be bytes that are not sound. FLAC files without a length have 2**63 - 1 samples.
    wanted = min(wanted, sound.frames)
    while read < wanted:
        # If a file ends before the length in its header, `SoundFile.blocks` returns uninitialized memory.
        block = sound.read(int(min(wanted - read, size)), dtype="float32", always_2d=True)  # [L, channels]
        if len(block) == 0:
            break
        mono = block.mean(axis=1) if sound.channels > 1 else block[:, 0]
        read += len(mono)
        levels.add(block, mono, sound.subtype)
        yield resample(mono)
    yield resample(np.zeros(0, np.float32), last=True)


def _resampler(rate: int, sample_rate: int) -> Callable[..., npt.NDArray[np.float32]]:
    """Function of successive blocks of samples, and of ``last``, that returns them at another rate."""
    if rate == sample_rate:
        return lambda mono, last=False: mono
    import soxr

    return soxr.ResampleStream(rate, sample_rate, 1, dtype="float32", quality="VHQ").resample_chunk
