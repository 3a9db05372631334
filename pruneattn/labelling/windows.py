"""Labels of waveforms of any length: cut into overlapping windows, batched across clips, averaged per clip."""

from collections import deque
from dataclasses import dataclass, field

import torch

from ..runtime.inference import autocast


@dataclass
class Clip:
    """A clip and what the model says about it, or the ``error`` for which it says nothing."""

    path: str
    wave: torch.Tensor | None = None  # float32 [L] at 16 kHz
    starts: list = field(default_factory=list)  # first sample of each window
    scores: list = field(default_factory=list)  # float32 [K] per window
    error: str | None = None

    @property
    def mean_scores(self):
        return torch.stack(self.scores).mean(0)  # [K]


def window_starts(samples, window, overlap):
    """First samples of the windows that cover a clip: one, or several of which neighbours share ``overlap`` or more.

    The last window ends with the clip, so that no window of a long clip is padded.
    """
    if samples <= window:
        return [0]
    step = max(1, round(window * (1 - overlap)))
    return [*range(0, samples - window, step), samples - window]


class Labeller:
    """Waveforms in, labels out: what ``python -m pruneattn.predict`` and a Ray actor do with decoded clips.

    Args:
        model: opened checkpoint on ``device``, in eval mode, with ``features``, ``labels`` and ``multilabel``.
        device: where to compute.
        amp: "fp32", "bf16" or "fp16".
        batch_size: windows at once.
        overlap: share of a window that the next one repeats, in [0, 1).
        top_k: labels in a row; all where the model has fewer.
        windows: whether rows also hold the labels of each window.
    """

    def __init__(self, model, device, *, amp="fp32", batch_size=16, overlap=0.5, top_k=5, windows=False):
        from ..data import FeatureExtractor
        from ..data.fbank import samples_for

        self.model, self.device, self.amp, self.batch_size = model, device, amp, batch_size
        self.overlap, self.top_k, self.windows = overlap, min(top_k, model.num_classes), windows
        self.features = FeatureExtractor(model.features).to(device)
        self.window = samples_for(model.frames)  # samples

    @torch.inference_mode()
    def clips(self, decoded):
        """Predict clips, batching their windows across them.

        Args:
            decoded: iterable of ``(path, wave, error)``; wave: float32 array ``[L]`` at 16 kHz, None with an error.

        Yields:
            ``Clip`` in the same order. Scores are softmax, or sigmoid if the model is multilabel.
        """
        waiting, pending = deque(), []  # clips without all their scores; windows that wait for a batch
        for path, wave, error in decoded:
            clip = Clip(path, error=error)
            waiting.append(clip)
            if error is None:
                clip.wave = torch.as_tensor(wave)
                clip.starts = window_starts(len(wave), self.window, self.overlap)
                pending.extend((clip, start) for start in clip.starts)
            while len(pending) >= self.batch_size:
                self._run(pending)
            yield from self._complete(waiting)
        while pending:
            self._run(pending)
        yield from self._complete(waiting)

    def row(self, clip):
        """A clip as plain values.

        Returns:
            dict of ``path``, ``seconds``, ``labels`` (best first) and their ``scores``; with ``windows`` also
            ``windows``, a list of dicts of ``start``, ``end`` (seconds), ``labels`` and ``scores``. Of ``path`` and
            ``error`` for a clip that has no labels.
        """
        from ..constants import SAMPLE_RATE

        if clip.error is not None:
            return {"path": clip.path, "error": clip.error}
        samples = len(clip.wave)
        row = {"path": clip.path, "seconds": samples / SAMPLE_RATE, **self._best(clip.mean_scores)}
        if self.windows:
            row["windows"] = [
                {
                    "start": start / SAMPLE_RATE,
                    "end": min(start + self.window, samples) / SAMPLE_RATE,
                    **self._best(scores),
                }
                for start, scores in zip(clip.starts, clip.scores)
            ]
        return row

    def _run(self, pending):
        """Score the first windows that wait, and take them off."""
        batch = pending[: self.batch_size]
        del pending[: self.batch_size]
        waves = [clip.wave[start : start + self.window] for clip, start in batch]
        lengths = torch.tensor([len(wave) for wave in waves])
        padded = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)  # [B, L]
        fbank = self.features(padded.to(self.device), lengths)  # [B, frames, 128]
        with autocast(self.device, self.amp):
            logits = self.model(fbank).float()  # [B, K]
        scores = (logits.sigmoid() if self.model.multilabel else logits.softmax(-1)).cpu()
        for (clip, _), row in zip(batch, scores):
            clip.scores.append(row)

    @staticmethod
    def _complete(waiting):
        while waiting and len(waiting[0].scores) == len(waiting[0].starts):
            clip = waiting.popleft()
            if clip.error is None and not clip.mean_scores.isfinite().all():
                clip.error = "the model's output is not finite (try --amp fp32)"
            yield clip

    def _best(self, scores):
        best = scores.topk(self.top_k)
        return {"labels": [self.model.labels[i] for i in best.indices.tolist()], "scores": best.values.tolist()}
