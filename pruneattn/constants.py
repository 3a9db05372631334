"""Numbers and formulas that several parts of the package share. Each is written here once."""

import math

#: Version of the package. ``pyproject.toml`` reads it from here.
VERSION = "0.2.0"

#: Side of a square patch: frames in time and bins in mel frequency.
PATCH = 16
#: Mel bins of a spectrogram.
MEL_BINS = 128
#: Sample rate in Hz.
SAMPLE_RATE = 16000
#: Samples in an analysis window, 25 ms.
WINDOW = 400
#: Samples from one frame to the next, 10 ms.
HOP = 160
#: Frequency range of the mel filters in Hz.
LOW_HZ, HIGH_HZ = 20.0, SAMPLE_RATE / 2


def patch_grid(frames: int, stride: tuple[int, int]) -> tuple[int, int]:
    """Patches along time and along mel of a spectrogram with this number of frames.

    Args:
        frames: at least 16.
        stride: mel bins and frames from one patch to the next, ``(frequency, time)``.
    """
    of_frequency, of_time = stride
    return (frames - PATCH) // of_time + 1, (MEL_BINS - PATCH) // of_frequency + 1


#: Mean and standard deviation of AudioSet's log-mel values, published with AST.
AUDIOSET_MEAN, AUDIOSET_STD = -4.2677393, 4.5689974


#: Kaldi's mel scale: ``MEL_FACTOR * ln(1 + f / MEL_CORNER)`` for a frequency f in Hz.
MEL_FACTOR, MEL_CORNER = 1127.0, 700.0


def mel(hertz: float) -> float:
    """Convert a frequency in Hz to Kaldi's mel scale."""
    return MEL_FACTOR * math.log(1.0 + hertz / MEL_CORNER)
