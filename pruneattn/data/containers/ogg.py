"""The pages of an Ogg file (RFC 3533): numbered, with checksums, in one or more sounds that follow each other."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from .parts import Incomplete, Part

_HEAD = struct.Struct("<4sBBqIIIB")
_FIRST, _LAST = 2, 4  # flags of a page: the first and the last of its stream
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_OPUS_RATE = 48_000  # Hz, for the positions of any Opus stream


class _Page(NamedTuple):
    end: int  # position of the next page
    flags: int
    granule: int  # position of its last sample, in a unit of the codec
    stream: int
    number: int
    body: bytes


def parts(file: BinaryIO, size: int, seconds: float | None) -> Iterator[Part]:
    """The sounds of an Ogg file.

    Args:
        file: the file, opened for reading.
        size: its length in bytes.
        seconds: pages of the first sound that are later than this are not checked; None checks all pages.

    Raises:
        Incomplete: a page is missing, incomplete or damaged.
    """
    start = _next_page(file, 0, size)
    while start is not None:
        end, following = _read_link(file, start, size, seconds)
        yield Part(start, end)
        start = following


def _read_link(file: BinaryIO, start: int, size: int, seconds: float | None) -> tuple[int, int | None]:
    """Check the pages of a sound. Returns its end, and the position of the sound that follows."""
    at, numbers, open_streams = start, dict[int, int](), set[int]()
    enough: float = float("inf")
    beginning = True
    while True:
        page = _read_page(file, at, size)
        if page is None:
            following = _next_page(file, at, size)
            if following is not None:
                if not open_streams and _is_first(file, following):
                    return at, following
                raise Incomplete(f"the Ogg file is damaged: {following - at} bytes at byte {at} are not a page")
            break
        first = bool(page.flags & _FIRST)
        if first and not beginning:
            break
        beginning = first
        if first and seconds is not None and enough == float("inf"):
            enough = seconds * _granule_rate(page.body)
        expected = numbers.get(page.stream, page.number - 1) + 1
        if page.number != expected:
            raise Incomplete(f"the Ogg file has a hole: page {page.number} follows page {expected - 1} at byte {at}")
        numbers[page.stream] = page.number
        open_streams.add(page.stream)
        if page.flags & _LAST:
            open_streams.discard(page.stream)
        if page.granule >= enough:
            return size, None
        at = page.end
    if open_streams:
        raise Incomplete("the Ogg file is truncated: the last page of its stream is missing")
    return at, at if page is not None else None


def _read_page(file: BinaryIO, at: int, size: int) -> _Page | None:
    """The page at a position; None if there is none."""
    file.seek(at)
    head = file.read(_HEAD.size)
    if not head.startswith(b"OggS\0"):
        if head and b"OggS\0".startswith(head):
            raise _cut(at)
        return None
    if len(head) < _HEAD.size:
        raise _cut(at)
    _, _, flags, granule, stream, number, checksum, segments = _HEAD.unpack(head)
    table = file.read(segments)
    body = file.read(sum(table))
    end = at + _HEAD.size + segments + sum(table)
    if len(table) < segments or end > size:
        raise _cut(at)
    if _checksum(head[:22] + bytes(4) + head[26:] + table + body) != checksum:
        raise Incomplete(f"the Ogg file is damaged: the checksum of page {number} at byte {at} is wrong")
    return _Page(end, flags, granule, stream, number, body)


def _cut(at: int) -> Incomplete:
    return Incomplete(f"the Ogg file is truncated: the page at byte {at} is incomplete")


def _is_first(file: BinaryIO, at: int) -> bool:
    file.seek(at + 5)
    return bool(file.read(1)[0] & _FIRST)


def _next_page(file: BinaryIO, at: int, size: int) -> int | None:
    """Position of the next page from a position on."""
    file.seek(at)
    tail = b""
    while block := file.read(1 << 16):
        text = tail + block
        found = text.find(b"OggS\0")
        if found >= 0:
            position = at - len(tail) + found
            return position if position + _HEAD.size <= size else None
        at, tail = at + len(block), text[-4:]
    return None


def _granule_rate(body: bytes) -> float:
    """Positions per second in a stream whose first page contains ``body``."""
    if body.startswith(b"\x01vorbis") and len(body) >= 16:
        return float(struct.unpack_from("<I", body, 12)[0])
    return _OPUS_RATE if body.startswith(b"OpusHead") else float("inf")


def _checksum(data: bytes) -> int:
    """CRC-32 of a page: that of zlib in the other order of bits, with 0 before the first byte and after the last."""
    crc = zlib.crc32(data.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{crc:032b}"[::-1], 2)
