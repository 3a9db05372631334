"""Clips that are too long to be held whole: decoded in blocks, and cut into windows while they arrive."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext

import numpy as np
import torch
from torch import Tensor

from ..constants import SAMPLE_RATE
from ..data.decode import decoding_error, stream_audio
from ..errors import UserError

#: Longer clips are not held whole.
LONGEST_SECONDS = 600.0

_SENT = 1 << 18  # samples in a message between processes, 1 MB


class LongClip:
    """A clip as an iterable of blocks, which are decoded each time anew.

    Args:
        path: the file.
        apart: decode in another process, so that a file that crashes the decoder does not end this one.

    Attributes:
        samples: length of the clip at 16 kHz, as far as it has been labeled.
    """

    def __init__(self, path: str, *, apart: bool) -> None:
        self.path, self.apart, self.samples = path, apart, 0

    def __iter__(self) -> Iterator[Tensor]:
        """Decode the clip.

        Yields:
            float32 ``[L]`` at 16 kHz.

        Raises:
            UserError: the clip cannot be decoded, after any number of blocks.
        """
        try:
            yield from map(torch.from_numpy, _received(self.path) if self.apart else stream_audio(self.path))
        except Exception as error:
            raise UserError(decoding_error(self.path, error)) from error

    def part(self, start: int, length: int) -> Tensor:
        """The samples from ``start`` on, ``length`` of them or fewer at the end of the clip."""
        parts, at = [], 0
        for block in self:
            parts.append(block[max(0, start - at) : max(0, start + length - at)])
            at += len(block)
            if at >= start + length:
                break
        return torch.cat(parts)


def stream_windows(
    blocks: Iterable[Tensor], window: int, starts: Callable[[int], list[int]]
) -> Iterator[tuple[int, Tensor, int]]:
    """Cut a clip into windows while it arrives.

    Args:
        blocks: the clip, in blocks of any length.
        window: samples of a window.
        starts: function of the length of a clip that returns the first sample of each window. All windows but the last
            are equally far apart, at most ``window``.

    Yields:
        The first sample of a window, its samples, and the number of samples that have arrived.
    """
    step = starts(4 * window)[1]
    held, first = torch.zeros(0), 0  # the samples from number `first` on
    count = 0
    for block in blocks:
        held = torch.cat([held, block])
        while first + len(held) > count * step + window:
            start = count * step
            yield start, held[start - first : start - first + window].clone(), first + len(held)
            count += 1
        # The last window starts behind the last one here.
        behind = max(0, (count - 1) * step - first)
        held, first = held[behind:], first + behind
    total = first + len(held)
    for start in starts(total)[count:]:
        yield start, held[start - first : start - first + window].clone(), total


def decoding_context() -> BaseContext:
    """Start method of the processes that decode.

    They are forked from a server that has loaded only the decoder. This process may have threads and a CUDA context,
    which do not survive a fork, and open files, which a fork would keep open.
    """
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    context.set_forkserver_preload(["pruneattn.data"])
    return context


def _received(path: str) -> Iterator[np.ndarray]:
    """Blocks of a clip from another process."""
    context = decoding_context()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(path, sender), daemon=True)  # type: ignore[attr-defined]
    process.start()
    sender.close()
    try:
        while (message := receiver.recv()) is not None:
            if isinstance(message, str):
                raise UserError(message)
            yield message
    except (EOFError, OSError):
        raise UserError(f"{path}: its decoding process crashed or was killed, maybe for lack of memory") from None
    finally:
        receiver.close()
        process.kill()  # it may be in the middle of the clip
        process.join()


def _send(path: str, sender: Connection) -> None:
    """Send the blocks of a clip, or the error as text, and None at the end."""
    for signum in (signal.SIGINT, signal.SIGTERM):  # can reach all processes; the main process stops this one
        signal.signal(signum, signal.SIG_IGN)
    try:
        for block in stream_audio(path, SAMPLE_RATE):
            for start in range(0, len(block), _SENT):
                sender.send(block[start : start + _SENT])
        sender.send(None)
    except BrokenPipeError:  # the main process needs no more, or has ended
        pass
    except Exception as error:
        sender.send(decoding_error(path, error))
