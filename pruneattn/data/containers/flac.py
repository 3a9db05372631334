"""FLAC files: joined ones, and those whose header has no length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

from .parts import Incomplete, Part, read_bytes

_STARTS = (b"fLaC\x00\x00\x00\x22", b"fLaC\x80\x00\x00\x22")  # of a file, with the size of its first block
_TAIL = 1 << 18  # bytes; a frame of 8 channels of 4608 samples of 32 bits is shorter
_TRIES = 3  # frame headers that are tried from the end; one in data that are not a header is rare


def parts(file: BinaryIO, size: int, sound: Any) -> Iterator[Part]:
    """The sounds of a FLAC file; the arguments are those of ``containers.parts``."""
    first = read_bytes(file, 0, 42)
    unknown = first[:4] == b"fLaC" and not int.from_bytes(first[21:26], "big") & 0xFFFFFFFFF
    if unknown:
        _check_last_frame(file, size)
    yield Part(0, size, 0 if unknown else sound.frames, sized=not unknown)  # libsndfile stops at the end of the first
    starts = [at for at in _find_starts(file) if at > 0]
    for start, end in zip(starts, [*starts[1:], size]):
        yield Part(start, end)


def _find_starts(file: BinaryIO) -> list[int]:
    """Positions in a file where a FLAC file starts."""
    found, at, tail = [], 0, b""
    file.seek(0)
    while block := file.read(1 << 20):
        text = tail + block
        place = -1
        while (place := text.find(b"fLaC", place + 1)) >= 0:
            if text.startswith(_STARTS, place):
                found.append(at - len(tail) + place)
        at, tail = at + len(block), text[-7:]
    return found


def _check_last_frame(file: BinaryIO, size: int) -> None:
    """Raise ``Incomplete`` if a file does not end with a complete frame, which ends with its checksum (RFC 9639)."""
    start = max(0, size - _TAIL)
    tail = read_bytes(file, start, size - start)
    at, tries = len(tail), 0
    while tries < _TRIES and (at := tail.rfind(b"\xff", 0, at)) >= 0:
        if _is_frame(tail[at : at + 16]):
            if _crc(tail[at:], _CRC16, 16) == 0:
                return
            tries += 1
    raise Incomplete("the file is truncated: its last FLAC frame is incomplete")


def _is_frame(head: bytes) -> bool:
    """Whether bytes start with the header of a frame, which has a checksum of its own."""
    if len(head) < 6 or head[0] != 0xFF or head[1] not in (0xF8, 0xF9):
        return False
    number = max(1, 8 - (head[4] ^ 0xFF).bit_length())  # coded as in UTF-8
    length = 4 + number + {6: 1, 7: 2}.get(head[2] >> 4, 0) + {12: 1, 13: 2, 14: 2}.get(head[2] & 15, 0) + 1
    return len(head) >= length and _crc(head[:length], _CRC8, 8) == 0


def _crc(data: bytes, table: list[int], bits: int) -> int:
    crc, mask = 0, (1 << bits) - 1
    for byte in data:
        crc = (crc << 8 & mask) ^ table[crc >> bits - 8 ^ byte]
    return crc


def _table(polynomial: int, bits: int) -> list[int]:
    table = []
    for value in range(256):
        crc = value << bits - 8
        for _ in range(8):
            crc = (crc << 1) ^ (polynomial if crc >> bits - 1 else 0)
            crc &= (1 << bits) - 1
        table.append(crc)
    return table


_CRC8, _CRC16 = _table(0x07, 8), _table(0x8005, 16)
