"""The frames of an MP3 file, which are counted, because only an optional first frame has their number."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import BinaryIO, NamedTuple

from .parts import Incomplete, Part

_BLOCK = 1 << 20  # bytes that are read at once
_LONGEST = 8192  # bytes; no frame or tag header is longer
_DELAY = 6  # frames that the delay of encoder and decoder, and the padding of the end, may take

#: kbit/s by (MPEG version is 1, layer).
_BITRATES = {
    (True, 1): range(32, 449, 32),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


class _Kind(NamedTuple):
    length: int  # bytes
    samples: int
    rate: int  # Hz
    stream: tuple[int, int, int]  # version, layer, rate: equal in all frames of a stream


class _Announced(NamedTuple):
    frames: int
    bytes: int  # with the frame that says so; 0 if unknown


@lru_cache(maxsize=1024)
def _kind(second: int, third: int) -> _Kind | None:
    """Kind of a frame by the second and third byte of its header; None if no frame has them."""
    version, layer = second >> 3 & 3, 4 - (second >> 1 & 3)
    bitrate, rate = third >> 4, third >> 2 & 3
    if second < 0xE0 or version == 1 or layer == 4 or bitrate in (0, 15) or rate == 3:
        return None
    hertz = (44100, 48000, 32000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
    bits = 1000 * _BITRATES[version == 3, layer][bitrate - 1]
    padding = third >> 1 & 1
    samples = 384 if layer == 1 else 576 if layer == 3 and version != 3 else 1152
    length = (12 * bits // hertz + padding) * 4 if layer == 1 else samples // 8 * bits // hertz + padding
    return _Kind(length, samples, hertz, (version, layer, hertz))


class _Bytes:
    """Random access to a file that is mostly read forward."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.start, self.data = file, size, 0, b""

    def at(self, position: int, count: int) -> bytes:
        offset = position - self.start
        if offset < 0 or offset + count > len(self.data):
            self.file.seek(position)
            self.start, self.data, offset = position, self.file.read(max(_BLOCK, count)), 0
        return self.data[offset : offset + count]


def parts(file: BinaryIO, size: int, seconds: float | None) -> Iterator[Part]:
    """The sounds of an MP3 file.

    The decoder stops after the number of frames that a first frame announces, so that a file that was joined to
    another is a new part. Without that number libsndfile estimates it from the size of the file, and stops there; it
    is then counted and given to it.

    Args:
        file: the file, opened for reading.
        size: its length in bytes.
        seconds: frames behind this time are not counted; None counts all frames.

    Raises:
        Incomplete: frames are missing.
    """
    data = _Bytes(file, size)
    start = at = _next_frame(data, 0)
    while at is not None:
        announced = _announced(data, at)
        end, frames, complete = _count(data, at, announced, seconds)
        kind = _frame(data, at)
        assert kind is not None
        least = max(0, frames - _DELAY) * kind.samples
        if announced is None:
            yield Part(at, end, least, sized=False, head=_announcing(data.at(at, 4), frames, end - at))
        else:
            short = announced.frames - frames
            # A few encoders count the first frame, too.
            if complete and (short > 1 or (short == 1 and end - at < announced.bytes)):
                raise Incomplete(f"the MP3 file is truncated: {short} of {announced.frames} frames are missing")
            following = _next_frame(data, end) if complete else None
            alone = at == start and following is None
            yield Part(0 if alone else at, size if alone else end, least)
        at = _next_frame(data, end) if complete else None


def _count(data: _Bytes, at: int, announced: _Announced | None, seconds: float | None) -> tuple[int, int, bool]:
    """Count the frames of a sound from a position on.

    Returns:
        The end of the last; the number of frames, without the one that has their number; and whether all have been
        counted.
    """
    first = _frame(data, at)
    assert first is not None
    enough = float("inf") if seconds is None else seconds * first.rate / first.samples + 2 * _DELAY
    most = float("inf") if announced is None else announced.frames
    frames, end = 0, at if announced is None else at + first.length
    while frames < most:
        if frames > enough:
            return end, frames, False
        kind = _frame(data, end)
        if kind is not None and kind.stream == first.stream and not (announced and _announced(data, end)):
            if end + kind.length > data.size:
                break
            end, frames = end + kind.length, frames + 1
            continue
        following = _next_frame(data, end)
        if following is None or _announced(data, following):
            break
        kind = _frame(data, following)
        if kind is None or kind.stream != first.stream:
            break
        end = following
    return end, frames, True


def _announcing(head: bytes, frames: int, size: int) -> bytes:
    """A frame without sound that announces a number of frames, for a stream with a frame of this header.

    Empty if there is none: decoders look for it in layer III only.
    """
    if head[1] >> 1 & 3 != 1:
        return b""
    for bitrate in range(1, 15):  # of a frame that has room
        third = bitrate << 4 | head[2] & 0x0C
        kind = _kind(head[1] | 1, third)
        if kind is not None and kind.length >= 192:
            break
    else:
        return b""
    start = bytes([0xFF, head[1] | 1, third, head[3]])
    place = _announcement_place(start)
    text = start + bytes(place - 4) + struct.pack(">4sIII", b"Xing", 3, frames, kind.length + size)
    return text + bytes(kind.length - len(text))


def _frame(data: _Bytes, at: int) -> _Kind | None:
    head = data.at(at, 3)
    return _kind(head[1], head[2]) if len(head) == 3 and head[0] == 0xFF else None


def _next_frame(data: _Bytes, at: int) -> int | None:
    """Position of the next frame, behind tags and damage: a frame is one if another or the end follows it."""
    while at < data.size:
        head = data.at(at, 32)
        if head.startswith(b"ID3") and len(head) >= 10:
            length = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
            at += 10 + length + (10 if head[5] & 0x10 else 0)
            continue
        if head.startswith(b"TAG"):
            at += 128
            continue
        if head.startswith(b"APETAGEX") and len(head) == 32:
            at += struct.unpack_from("<I", head, 12)[0] + (32 if head[23] & 0x80 and head[23] & 0x20 else 0)
            at = max(at, 1)
            continue
        kind = _frame(data, at)
        if kind is not None:
            after = at + kind.length
            other = _frame(data, after)
            if after == data.size or (other is not None and other.stream == kind.stream):
                return at
            if data.at(after, 3) in (b"TAG", b"APE", b"ID3"):
                return at
        block = data.at(at + 1, _LONGEST)
        found = min((place for place in map(block.find, (b"\xff", b"ID3", b"APETAGEX")) if place >= 0), default=-1)
        at += 1 + (found if found >= 0 else max(1, len(block) - 8))
    return None


def _announced(data: _Bytes, at: int) -> _Announced | None:
    """Number of frames in a frame at a position that has no sound (Xing, Info or VBRI); None if there is none."""
    head = data.at(at, 192)
    if len(head) < 60:
        return None
    place = _announcement_place(head)
    if head[place : place + 4] in (b"Xing", b"Info"):
        flags, frames, count = struct.unpack_from(">III", head, place + 4)
        if flags & 1 and frames:
            return _Announced(frames, count if flags & 2 else 0)
    if head[36:40] == b"VBRI":
        count, frames = struct.unpack_from(">II", head, 46)
        return _Announced(frames, count) if frames else None
    return None


def _announcement_place(head: bytes) -> int:
    """Position of a number of frames in a frame, behind the side information."""
    mono = head[3] >> 6 == 3
    return 4 + ((17 if mono else 32) if head[1] >> 3 & 3 == 3 else (9 if mono else 17))
