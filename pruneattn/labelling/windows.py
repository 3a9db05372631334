"""Labels of waveforms of any length: overlapping windows, batched across clips, averaged for each clip."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..constants import PATCH, SAMPLE_RATE
from ..data import FeatureExtractor
from ..data.fbank import samples_for
from ..errors import UserError
from ..models import PrunedViT
from ..runtime.inference import autocast
from .long_clips import LongClip, stream_windows


@dataclass
class Clip:
    """A clip and the model's scores of its windows, or the ``error`` for which it has none."""

    path: str
    wave: Tensor | LongClip | None = None  # float32 [L] at 16 kHz
    starts: list[int] = field(default_factory=list)  # first sample of each window
    scores: list[Tensor] = field(default_factory=list)  # float32 [K] per window
    error: str | None = None

    @property
    def mean_scores(self) -> Tensor:
        """Mean of the windows' scores, float32 ``[K]``."""
        return torch.stack(self.scores).mean(0)  # [K]

    @property
    def samples(self) -> int:
        """Length of the clip."""
        assert self.wave is not None
        return self.wave.samples if isinstance(self.wave, LongClip) else len(self.wave)

    def part(self, start: int, length: int) -> Tensor:
        """The samples from ``start`` on, ``length`` of them or fewer at the end of the clip."""
        assert self.wave is not None
        return self.wave.part(start, length) if isinstance(self.wave, LongClip) else self.wave[start : start + length]


def window_starts(samples: int, window: int, overlap: float, covered: int | None = None) -> list[int]:
    """First samples of the windows that cover a clip. Adjacent windows share at least the fraction ``overlap``.

    A clip that fits into a window has one window. The last window of a longer clip ends with the clip, so that no patch
    is padded.

    Args:
        samples: length of the clip.
        window: samples of a window.
        overlap: fraction in [0, 1).
        covered: samples at the start of a window that patches cover: the windows of a longer clip overlap and end by
            these. None: the whole window.
    """
    if samples <= window:
        return [0]
    covered = window if covered is None else covered
    step = max(1, round(covered * (1 - overlap)))
    return [*range(0, samples - covered, step), samples - covered]


class Labeler:
    """Label decoded clips, as ``pruneattn predict`` and the Ray example do.

    Args:
        model: opened checkpoint on ``device``, in eval mode, with a complete ``description``.
        device: device of the model.
        amp: "fp32", "bf16" or "fp16".
        batch_size: windows in a batch.
        overlap: fraction of a window that the next window shares, in [0, 1).
        top_k: number of labels in a row; all labels if the model has fewer.
        windows: whether rows also have the labels of each window.
    """

    def __init__(
        self,
        model: PrunedViT,
        device: torch.device | str,
        *,
        amp: str = "fp32",
        batch_size: int = 16,
        overlap: float = 0.5,
        top_k: int = 5,
        windows: bool = False,
    ) -> None:
        self.model, self.device, self.amp, self.batch_size = model, device, amp, batch_size
        self.overlap, self.top_k, self.windows = overlap, min(top_k, model.num_classes), windows
        self.features = FeatureExtractor(model.features).to(device)
        self.window = samples_for(model.frames)  # samples
        self.covered = samples_for(PATCH + (model.grid[0] - 1) * model.stride[1])  # samples before the last patch's end

    @torch.inference_mode()
    def clips(self, decoded: Iterable[tuple[str, Any, str | None]]) -> Iterator[Clip]:
        """Label clips, with the windows of several clips in one batch.

        Args:
            decoded: iterable of ``(path, wave, error)``, where ``wave`` is a float32 array ``[L]`` at 16 kHz, a
                ``LongClip``, or None with an error.

        Yields:
            ``Clip`` in the same order. Scores are sigmoids if the model is multilabel, else a softmax.
        """
        waiting: deque[Clip] = deque()  # clips that lack scores
        pending: list[tuple[Clip, int]] = []  # windows without a batch
        for path, wave, error in decoded:
            while pending and isinstance(wave, LongClip):  # other clips do not wait for it
                self._run(pending)
            yield from self._complete(waiting)
            clip = Clip(path, error=error)
            waiting.append(clip)
            if isinstance(wave, LongClip):
                clip.wave = wave
                self._score_long(clip, wave)
            elif error is None:
                clip.wave = torch.as_tensor(wave)
                clip.starts = self._starts(clip.samples)
                pending.extend((clip, start) for start in clip.starts)
            while len(pending) >= self.batch_size:
                self._run(pending)
            yield from self._complete(waiting)
        while pending:
            self._run(pending)
        yield from self._complete(waiting)

    def row(self, clip: Clip) -> dict[str, Any]:
        """A labeled clip as plain values.

        Returns:
            dict with ``path``, ``seconds``, ``labels`` (best first) and their ``scores``; with ``windows`` also
            ``windows``, a list of dicts with ``start``, ``end`` (seconds), ``labels`` and ``scores``. A clip without
            labels has ``path`` and ``error`` only.
        """
        if clip.error is not None:
            return {"path": clip.path, "error": clip.error}
        row: dict[str, Any] = {"path": clip.path, "seconds": clip.samples / SAMPLE_RATE, **self._best(clip.mean_scores)}
        if self.windows:
            row["windows"] = [
                {
                    "start": start / SAMPLE_RATE,
                    "end": min(start + self.window, clip.samples) / SAMPLE_RATE,
                    **self._best(scores),
                }
                for start, scores in zip(clip.starts, clip.scores)
            ]
        return row

    def _starts(self, samples: int) -> list[int]:
        return window_starts(samples, self.window, self.overlap, self.covered)

    def _run(self, pending: list[tuple[Clip, int]]) -> None:
        """Score the first batch of windows, and remove them from the list."""
        batch = pending[: self.batch_size]
        del pending[: self.batch_size]
        for (clip, _), row in zip(batch, self._score([clip.part(start, self.window) for clip, start in batch])):
            clip.scores.append(row)

    def _score_long(self, clip: Clip, wave: LongClip) -> None:
        """Score the windows of a clip while it is decoded."""
        windows = stream_windows(wave, self.window, self._starts)
        try:
            while batch := list(islice(windows, self.batch_size)):
                clip.scores.extend(self._score([window for _, window, _ in batch]))
                clip.starts.extend(start for start, _, _ in batch)
                wave.samples = batch[-1][2]
        except UserError as error:
            clip.error, clip.scores, clip.starts = str(error), [], []

    def _score(self, waves: list[Tensor]) -> Tensor:
        """Scores of windows, float32 ``[B, K]``."""
        lengths = torch.tensor([len(wave) for wave in waves])
        padded = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)  # [B, L]
        fbank = self.features(padded.to(self.device), lengths)  # [B, frames, 128]
        with autocast(self.device, self.amp):
            logits = self.model(fbank).float()  # [B, K]
        return (logits.sigmoid() if self.model.multilabel else logits.softmax(-1)).cpu()

    @staticmethod
    def _complete(waiting: deque[Clip]) -> Iterator[Clip]:
        while waiting and len(waiting[0].scores) == len(waiting[0].starts):
            clip = waiting.popleft()
            if clip.error is None and not clip.mean_scores.isfinite().all():
                clip.error = "the model's output is not finite; try --amp fp32"
            yield clip

    def _best(self, scores: Tensor) -> dict[str, list]:
        assert self.model.labels is not None
        best = scores.topk(self.top_k)
        return {"labels": [self.model.labels[i] for i in best.indices.tolist()], "scores": best.values.tolist()}
