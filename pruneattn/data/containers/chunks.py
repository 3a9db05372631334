"""Formats that consist of chunks (RIFF, RF64, AIFF, 8SVX, Wave64, CAF): where their sound is."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from .parts import Extent, read_bytes, read_number

_STREAMED = ((0x7FFF0000, 0x80000000), (0xFFFF0000, 0xFFFFFFFF))  # written by programs that do not know the size
_MOST_CHUNKS = 10_000
_WRAP = 1 << 32  # sizes of 32 bits are the true sizes modulo this number


class _Chunks(NamedTuple):
    """A format that consists of chunks: a name, a size, the content."""

    first: int  # position of the first chunk
    name: int  # bytes of the name, of which the first four are compared
    size: str
    aligned: int  # chunks start at multiples of this number
    counted: bool  # whether a size includes the name and the size
    head: int  # bytes before the samples in the chunk of the sound


_WAVE = _Chunks(12, 4, "<I", 2, False, 0)
#: Formats of chunks by the first four bytes.
CHUNKS = {
    b"RIFF": _WAVE,
    b"RF64": _WAVE,
    b"BW64": _WAVE,
    b"RIFX": _WAVE._replace(size=">I"),
    b"FORM": _WAVE._replace(size=">I"),
    b"riff": _Chunks(40, 16, "<Q", 8, True, 0),  # Wave64
    b"caff": _Chunks(8, 4, ">q", 1, False, 4),
}
_SOUND_CHUNKS = (b"data", b"SSND", b"BODY")


def chunk_extent(file: BinaryIO, at: int, size: int, kind: _Chunks) -> Extent | None:
    """Where the sound of the file at a position is; None if it has no chunk of sound."""
    magic = read_bytes(file, at, 4)
    wide = 0  # size of the sound in a ds64 chunk
    for name, start, length in _chunks(file, at, size, kind):
        if name == b"ds64":
            wide = read_number(file, start + 8, "<Q")
        if name not in _SOUND_CHUNKS:
            continue
        head = 8 if name == b"SSND" else kind.head
        end: int | None = start + length
        if magic in (b"RF64", b"BW64") and length == 0xFFFFFFFF:
            end = start + wide if wide else None
        elif length < 0 or (kind.size in ("<I", ">I") and _is_streamed(length)):
            end = None
        elif length == 0 and kind is _WAVE:
            if not _ends_in_chunks(file, start, size, kind):
                end = None
        elif kind.size in ("<I", ">I"):
            end = start + length + max(0, size - start - length) // _WRAP * _WRAP
        doubtful = end is None or end != start + length
        return Extent(start + head, end, doubtful)
    return None


def _chunks(file: BinaryIO, at: int, size: int, kind: _Chunks) -> Iterator[tuple[bytes, int, int]]:
    """``(name, position, length)`` of the content of each chunk."""
    position = at + kind.first
    head = kind.name + struct.calcsize(kind.size)
    for _ in range(_MOST_CHUNKS):
        if position + head > size:
            return
        name = read_bytes(file, position, 4)
        length = read_number(file, position + kind.name, kind.size) - (head if kind.counted else 0)
        yield name, position + head, length
        if length < 0:
            return
        position += head + length
        position += -(position - at) % kind.aligned


def _is_streamed(length: int) -> bool:
    return any(low <= length <= high for low, high in _STREAMED)


def _ends_in_chunks(file: BinaryIO, at: int, size: int, kind: _Chunks) -> bool:
    """Whether chunks fill the file from a position on, so that a sound of length 0 before them is really empty."""
    end = at
    for name, start, length in _chunks(file, at, size, kind._replace(first=0)):
        if not name.isascii() or not name.decode("ascii").isprintable():
            return False
        end = start + length + length % 2
    return size <= end <= size + 1
