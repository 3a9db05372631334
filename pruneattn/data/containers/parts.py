"""Parts of a file, and the numbers in it."""

from __future__ import annotations

import io
import os
import struct
from typing import BinaryIO, Literal, NamedTuple


class Incomplete(Exception):
    """A part of a sound is missing or damaged; the message says which, without the name of the file."""


class Part(NamedTuple):
    """A part of a file that holds one sound."""

    start: int  # first byte
    end: int  # byte after the last
    frames: int = 0  # samples in each channel that it must have at least
    missing: int = 0  # bytes that its header announces and the file does not have
    raw: Literal["LITTLE", "BIG", False] = False  # byte order of samples without a header; False with a header
    sized: bool = True  # whether the container has a length
    head: bytes = b""  # bytes before the first, for the decoder


class Extent(NamedTuple):
    """Where a header says that its sound is, in bytes from the start of the file."""

    start: int
    end: int | None  # None if the header does not know
    doubtful: bool = False  # whether libsndfile may read less, because the sizes in the header are wrong


class PartFile(io.RawIOBase):
    """A part of an open file as a file, behind the ``head`` of the part."""

    def __init__(self, file: BinaryIO, part: Part) -> None:
        self._file, self._part, self._at = file, part, 0
        self._size = len(part.head) + part.end - part.start

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, origin + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # any writable buffer
        count = max(0, min(len(buffer), self._size - self._at))
        data = self._part.head[self._at : self._at + count]
        if len(data) < count:
            place = self._part.start + self._at + len(data) - len(self._part.head)
            data += read_bytes(self._file, place, count - len(data))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def read_bytes(file: BinaryIO, at: int, count: int) -> bytes:
    """Bytes at a position, fewer at the end of the file."""
    if not 0 <= at < 1 << 63:  # of a damaged header
        return b""
    file.seek(at)
    return file.read(count)


def read_number(file: BinaryIO, at: int, form: str) -> int:
    """A number at a position, in a form of ``struct``; 0 behind the end of the file."""
    found = read_bytes(file, at, struct.calcsize(form))
    return int(struct.unpack(form, found)[0]) if len(found) == struct.calcsize(form) else 0
