"""Scores of sound files of any length: cut into overlapping windows, batched across files, averaged per file."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from .errors import UserError
from .inference import autocast


@dataclass
class Clip:
    """A sound file and what the model says about it."""

    path: Path
    wave: torch.Tensor | None  # float32 [L] at 16 kHz; given up once it is not needed any more
    samples: int
    starts: list  # first sample of each window
    scores: list = field(default_factory=list)  # float32 [K] per window

    @property
    def mean_scores(self):
        return torch.stack(self.scores).mean(0)  # [K]


def find_clips(inputs, failed):
    """Sound files among and below ``inputs``, each once, in the order given; what is none is added to ``failed``."""
    from .data import find_audio

    paths = {}
    for given in map(Path, inputs):
        if not given.is_dir():
            paths[given] = None  # decoding tells whether it is there and sound
            continue
        found = find_audio(given)
        paths.update(dict.fromkeys(found))
        if not found:
            failed.append((str(given), "no sound files in this folder"))
    return list(paths)


def window_starts(samples, window, overlap):
    """First samples of the windows that cover a clip: one, or several of which neighbours share ``overlap`` or more.

    The last window ends with the clip, so that no window of a long clip is padded.
    """
    if samples <= window:
        return [0]
    step = max(1, round(window * (1 - overlap)))
    return [*range(0, samples - window, step), samples - window]


@torch.inference_mode()
def predict_clips(model, paths, failed, device, *, amp="fp32", batch_size=16, overlap=0.5, keep_waves=False):
    """Predict sound files, batching windows across files.

    Args:
        model: opened checkpoint on ``device``.
        paths: files, decoded one after the other.
        failed: list that gets ``(path, reason)`` of every file that cannot be predicted.
        amp: "fp32", "bf16" or "fp16".
        batch_size: windows at once.
        overlap: share of a window that the next one repeats, in [0, 1).
        keep_waves: leave the waveforms in the results.

    Yields:
        ``Clip`` in the order of ``paths``: per window softmax, or sigmoid if the model is multilabel.
    """
    from .data import FeatureExtractor, load_audio
    from .data.fbank import samples_for

    features = FeatureExtractor(model.features).to(device)
    window = samples_for(model.frames)
    waiting, pending = [], []  # clips without all their scores; windows that wait for a batch

    def run(count):
        batch = pending[:count]
        del pending[:count]
        waves = [clip.wave[start : start + window] for clip, start in batch]
        lengths = torch.tensor([len(wave) for wave in waves])
        padded = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)  # [B, L]
        fbank = features(padded.to(device), lengths)
        with autocast(device, amp):
            logits = model(fbank).float()  # [B, K]
        scores = (logits.sigmoid() if model.multilabel else logits.softmax(-1)).cpu()
        for (clip, _), row in zip(batch, scores):
            clip.scores.append(row)

    def complete():
        while waiting and len(waiting[0].scores) == len(waiting[0].starts):
            clip = waiting.pop(0)
            if not keep_waves:
                clip.wave = None
            if clip.mean_scores.isfinite().all():
                yield clip
            else:
                failed.append((str(clip.path), "the model's output is not finite (try --amp fp32)"))

    for path in paths:
        try:
            wave = load_audio(path)
        except (UserError, OSError) as error:
            failed.append((str(path), str(error)))
            continue
        clip = Clip(path, wave, len(wave), window_starts(len(wave), window, overlap))
        waiting.append(clip)
        pending.extend((clip, start) for start in clip.starts)
        while len(pending) >= batch_size:
            run(batch_size)
            yield from complete()
    while pending:
        run(batch_size)
    yield from complete()
