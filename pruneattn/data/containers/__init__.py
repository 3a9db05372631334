"""The sounds in a file: where each one starts and how long it must be, from the container and not from the decoder.

libsndfile shortens a sound to the bytes that a file has, and stops at the end of the first sound. The length in the
header is therefore read here, and compared with the number of samples that the decoder returns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO, Literal

from . import flac, mpeg, ogg
from .headers import find_extent
from .parts import Incomplete, Part, read_bytes

_WIDTHS = dict(PCM_S8=1, PCM_U8=1, PCM_16=2, PCM_24=3, PCM_32=4, FLOAT=4, DOUBLE=8, ULAW=1, ALAW=1)  # bytes
_MOST_FRAMES = 1000  # per byte; damaged sizes make libsndfile return silence for years
#: Formats whose truncation libsndfile reports.
_CHECKED = frozenset({"HTK"})


def parts(file: BinaryIO, size: int, sound: Any, seconds: float | None) -> Iterator[Part]:
    """The sounds in a file, in order. The search for a part starts when the part before it has been read.

    Args:
        file: the file, opened for reading.
        size: its length in bytes.
        sound: the same file as a ``soundfile.SoundFile``.
        seconds: length that is needed from the start, or None: damage behind it is not searched for.

    Raises:
        Incomplete: a part of the sound is missing; the message says which, without the name of the file.
    """
    if sound.format == "OGG":
        yield from ogg.parts(file, size, seconds)
    elif sound.format == "MP3":
        yield from mpeg.parts(file, size, seconds)
    elif sound.format == "FLAC":
        yield from flac.parts(file, size, sound)
    else:
        yield from _plain_parts(file, size, sound)


def _plain_parts(file: BinaryIO, size: int, sound: Any) -> Iterator[Part]:
    """The sounds of a format that stores a number of bytes or samples."""
    if sound.frames > _MOST_FRAMES * size:
        raise Incomplete(f"the file has {size} bytes, but its header announces {sound.frames} samples")
    magic = read_bytes(file, 0, 4)
    at: int | None = 0
    while at is not None:
        extent = find_extent(file, at, size, sound.format)
        if extent is None:
            yield Part(at, size, sized=sound.format in _CHECKED)
            return
        end = size if extent.end is None else extent.end
        plain = at == 0 and sound.format != "SDS"  # the width is that of the first of joined files; SDS has packets
        width = _WIDTHS.get(sound.subtype, 0) * sound.channels if plain else 0
        frames = (end - extent.start) // width if width else 0
        following = _following(file, end, magic)
        stop = size if following is None else following
        sized, missing = extent.end is not None, max(0, end - size)
        if at == 0 and extent.doubtful and sound.frames < frames and sound.format in ("WAV", "WAVEX"):
            order: Literal["LITTLE", "BIG"] = "BIG" if magic == b"RIFX" else "LITTLE"
            yield Part(extent.start, min(end, size), frames, missing, order, sized=sized)
        elif extent.doubtful or missing or following is not None:
            yield Part(at, stop, frames, missing, sized=sized)
        else:
            yield Part(at, stop, sound.frames if at == 0 else 0, sized=sized)
        at = following


def _following(file: BinaryIO, end: int, magic: bytes) -> int | None:
    """Where another file of the same format follows the end of a sound, which may be padded."""
    places = range(end, end + 8) if magic.strip(b"\0") else ()
    return next((place for place in places if read_bytes(file, place, len(magic)) == magic), None)
