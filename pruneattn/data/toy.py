"""Ten kinds of synthetic sound events, generated from a seed: a dataset that needs no files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ..constants import SAMPLE_RATE
from .clips import Clip, ClipDataset

Floats = npt.NDArray[np.float64]

SIZES = {"train": 2000, "val": 400, "test": 400}


def _phase(frequency: Floats) -> Floats:
    """Phase in radians of an oscillator with this frequency (Hz) at each sample."""
    return 2 * np.pi * np.cumsum(frequency) / SAMPLE_RATE


def _pitch(rng: np.random.Generator, low: float, high: float) -> float:
    return low * (high / low) ** rng.random()


def _tone(rng: np.random.Generator, t: Floats) -> Floats:
    return np.sin(_phase(np.full_like(t, _pitch(rng, 300, 4000))))


def _chirp_up(rng: np.random.Generator, t: Floats) -> Floats:
    return np.sin(_phase(_pitch(rng, 250, 1200) * _pitch(rng, 2.5, 5) ** (t / t[-1])))


def _chirp_down(rng: np.random.Generator, t: Floats) -> Floats:
    return _chirp_up(rng, t)[::-1]


def _noise(rng: np.random.Generator, t: Floats) -> Floats:
    return rng.standard_normal(len(t))


def _clicks(rng: np.random.Generator, t: Floats) -> Floats:
    """Single impulses at irregular intervals."""
    sound = np.zeros_like(t)
    gaps = rng.integers(SAMPLE_RATE // 40, SAMPLE_RATE // 10, size=40)
    at = np.cumsum(gaps) - gaps[0]
    at = at[at < len(t)]
    sound[at] = rng.choice([-1.0, 1.0], size=len(at)) * (0.5 + rng.random(len(at)) / 2)
    return sound


def _beeps(rng: np.random.Generator, t: Floats) -> Floats:
    """A tone in short pulses, 8 to 13 per second."""
    swell = (1 - np.cos(2 * np.pi * _pitch(rng, 8, 13) * t)) / 2
    return _tone(rng, t) * swell**3


def _siren(rng: np.random.Generator, t: Floats) -> Floats:
    """A tone whose pitch swings up and down."""
    swing = np.sin(2 * np.pi * (_pitch(rng, 4, 8) * t + rng.random()))
    return np.sin(_phase(_pitch(rng, 500, 2500) * 1.5**swing))


def _chord(rng: np.random.Generator, t: Floats) -> Floats:
    """Four simultaneous tones, a major chord with its octave."""
    root = _pitch(rng, 250, 1000)
    tones = [np.sin(_phase(np.full_like(t, root * ratio)) + 2 * np.pi * rng.random()) for ratio in (1, 1.26, 1.5, 2)]
    return tones[0] + tones[1] + tones[2] + tones[3]


def _buzz(rng: np.random.Generator, t: Floats) -> Floats:
    """A sawtooth: many harmonics of a low pitch."""
    return 2 * np.mod(_pitch(rng, 120, 300) * t, 1) - 1


def _knocks(rng: np.random.Generator, t: Floats) -> Floats:
    """Low, quickly damped strokes at a regular interval."""
    since = np.mod(t, 0.09 + 0.06 * rng.random())
    return np.sin(2 * np.pi * _pitch(rng, 120, 400) * since) * np.exp(-since / 0.015)


KINDS = {
    "tone": _tone,
    "chirp up": _chirp_up,
    "chirp down": _chirp_down,
    "noise": _noise,
    "clicks": _clicks,
    "beeps": _beeps,
    "siren": _siren,
    "chord": _chord,
    "buzz": _buzz,
    "knocks": _knocks,
}


def make_sound(kind: str, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Make one clip: 0.5 to 1 s of faint noise with an event of 0.2 to 0.4 s at a random time and level.

    All kinds share the distributions of length, onset, level and noise, so these do not distinguish them.

    Args:
        kind: a key of ``KINDS``.
        rng: ``numpy.random.Generator``.

    Returns:
        float32 array ``[L]`` with ``|x| <= 1``.
    """
    length = rng.integers(SAMPLE_RATE // 2, SAMPLE_RATE + 1)
    event = rng.integers(SAMPLE_RATE // 5, 2 * SAMPLE_RATE // 5 + 1)
    onset = rng.integers(0, length - event + 1)
    sound = KINDS[kind](rng, np.arange(event) / SAMPLE_RATE)
    fade = np.minimum(1, np.minimum(np.arange(event), np.arange(event)[::-1]) / (0.005 * SAMPLE_RATE))
    sound = sound * fade if kind != "clicks" else sound  # a fade would remove an impulse
    level, distance = _pitch(rng, 0.003, 0.03), _pitch(rng, 30, 300)  # RMS of the event; event over background
    wave = rng.standard_normal(length) * level / distance
    wave[onset : onset + event] += sound * level / np.sqrt(np.mean(sound**2))
    return np.clip(wave, -1, 1).astype(np.float32)


class ToyDataset(ClipDataset):
    """``SIZES[split]`` clips, the same for the same seed, with the kinds in rotation."""

    def __init__(self, split: str, *, seed: int = 0, max_samples: int | None = None, cache: bool = False) -> None:
        self._key = (seed, list(SIZES).index(split))
        names = list(KINDS)
        clips = [Clip(Path("toy", split, f"{i:04d}"), (i % len(names),)) for i in range(SIZES[split])]
        super().__init__("toy", clips, names, multilabel=False, max_samples=max_samples, cache=cache)

    def read(self, index: int) -> torch.Tensor:
        """Make clip ``index``, float32 ``[L]``."""
        kind = self.labels[self.clips[index].labels[0]]
        return torch.from_numpy(make_sound(kind, np.random.default_rng((*self._key, index))))
