"""Where the sound is according to headers of fixed layout."""

from __future__ import annotations

import re
from typing import BinaryIO

from .chunks import CHUNKS, chunk_extent
from .parts import Extent, read_bytes, read_number

_MOST_BLOCKS = 10_000


def find_extent(file: BinaryIO, at: int, size: int, form: str) -> Extent | None:
    """Where the header at a position says that the sound is; None for a format that stores no length."""
    kind = CHUNKS.get(read_bytes(file, at, 4))
    if kind is not None:
        return chunk_extent(file, at, size, kind)
    if form == "VOC":
        return _voc(file, at, size)
    reader = _READERS.get(form)
    return reader(file, at) if reader is not None else None


def _au(file: BinaryIO, at: int) -> Extent:
    order = ">" if read_bytes(file, at, 4) == b".snd" else "<"
    start, length = (read_number(file, at + place, f"{order}I") for place in (4, 8))
    end = None if length == 0xFFFFFFFF else at + start + length
    return Extent(at + start, end)


def _avr(file: BinaryIO, at: int) -> Extent:
    channels = 2 if read_number(file, at + 12, ">H") else 1
    return Extent(
        at + 128, at + 128 + read_number(file, at + 26, ">I") * channels * read_number(file, at + 14, ">H") // 8
    )


def _mpc2k(file: BinaryIO, at: int) -> Extent:
    channels = 2 if read_number(file, at + 21, "B") else 1
    return Extent(at + 42, at + 42 + read_number(file, at + 30, "<I") * channels * 2)


def _wve(file: BinaryIO, at: int) -> Extent:
    return Extent(at + 32, at + 32 + read_number(file, at + 18, ">I"))


def _xi(file: BinaryIO, at: int) -> Extent:
    count = read_number(file, at + 296, "<H")
    start = at + 298 + 40 * count
    length = sum(read_number(file, at + 298 + 40 * number, "<I") for number in range(count))
    return Extent(start, start + length if length else None)


def _nist(file: BinaryIO, at: int) -> Extent | None:
    head = read_bytes(file, at, 1024)
    start = re.match(rb"NIST_1A\s+(\d+)", head)
    fields = [re.search(rb"^%s -\w+ (\d+)" % name, head, re.MULTILINE) for name in _NIST_FIELDS]
    if start is None or not all(fields):
        return None
    length = 1
    for field in fields:
        length *= int(field[1]) if field else 0
    return Extent(at + int(start[1]), at + int(start[1]) + length)


_NIST_FIELDS = (b"sample_count", b"channel_count", b"sample_n_bytes")


def _mat4(file: BinaryIO, at: int) -> Extent:
    order = "<" if read_bytes(file, at, 4) == bytes(4) else ">"
    end, start = at, at
    for _ in range(2):  # the sample rate, the samples
        kind, rows, columns, _, name = (read_number(file, end + 4 * field, f"{order}i") for field in range(5))
        start = end + 20 + name
        end = start + rows * columns * (8, 4, 4, 2, 2, 1)[min(5, kind // 10 % 10)]
    return Extent(start, end)


def _mat5(file: BinaryIO, at: int) -> Extent:
    order = "<" if read_bytes(file, at + 126, 2) == b"IM" else ">"
    position = at + 136  # in the matrix that holds the sample rate
    for element in range(8):  # flags, shape, name and values of each of two matrices
        kind, length = (read_number(file, position + 4 * field, f"{order}I") for field in range(2))
        if kind >> 16:  # a short value is in its own tag
            position += 8
        else:
            start, end = position + 8, position + 8 + length
            position = end + -end % 8
        if element == 3:
            position += 8
    return Extent(start, end)


def _sds(file: BinaryIO, at: int) -> Extent:
    """Samples of 2 to 4 bytes in packets, each with 120 bytes of them."""
    bits = read_number(file, at + 6, "B")
    width = 2 if bits < 15 else 3 if bits < 22 else 4
    low, middle, high = (read_number(file, at + place, "B") for place in (10, 11, 12))
    packets = -(-(low | middle << 7 | high << 14) // (120 // width))
    return Extent(at + 21, at + 21 + 127 * packets)


def _voc(file: BinaryIO, at: int, size: int) -> Extent | None:
    """The blocks of sound, of which libsndfile reads the first."""
    position, start, total, blocks = at + read_number(file, at + 20, "<H"), 0, 0, 0
    for _ in range(_MOST_BLOCKS):
        kind, length = read_number(file, position, "B"), read_number(file, position, "<I") >> 8
        if kind == 0 or kind > 9 or (blocks and position + length > size):
            break
        head = {1: 2, 2: 0, 9: 12}.get(kind)
        if head is not None:
            start = start or position + 4 + head
            # A length of 24 bits is the true length modulo 16 MB.
            length += max(0, size - position - 4 - length) >> 24 << 24
            total, blocks = total + length - head, blocks + 1
        position += 4 + length
    return Extent(start, start + total, doubtful=blocks > 1) if start else None


_READERS = dict(AU=_au, AVR=_avr, MPC2K=_mpc2k, WVE=_wve, XI=_xi, NIST=_nist, MAT4=_mat4, MAT5=_mat5, SDS=_sds)
