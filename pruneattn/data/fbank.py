"""Kaldi log-mel filterbank of a batch of waveforms, and the normalised input of the models."""

import math
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from ..constants import (
    AUDIOSET_MEAN,
    AUDIOSET_STD,
    HIGH_HZ,
    HOP,
    LOW_HZ,
    MEL_BINS,
    MEL_CORNER,
    MEL_FACTOR,
    SAMPLE_RATE,
    WINDOW,
    mel,
)
from ..errors import UserError

#: Smallest value a log-mel can take, log(2^-23): Kaldi floors the energies at float32's epsilon. Every clip reaches
#: it, since with these settings one mel filter (number 3) covers no FFT bin at all.
LOG_FLOOR = math.log(2.0**-23)

_FFT = 512
_CHUNK = 512  # frames worked on at a time on a CPU: a whole batch would fall out of its cache and be slower
_PREEMPHASIS = 0.97


def samples_for(frames):
    """Samples at 16 kHz that give exactly ``frames`` frames."""
    return (frames - 1) * HOP + WINDOW


def remove_mean(waves, lengths=None):
    """Subtract each clip's mean over its own length; padding becomes exactly 0, whatever it held.

    Args:
        waves: float ``[B, L]``.
        lengths: int64 ``[B]``, samples of each clip; None: all have L.
    """
    return zero_beyond(waves - _clip_mean(waves, lengths)[:, None], lengths)


def zero_beyond(x, lengths):
    """``x`` ``[B, L]`` or ``[B, L, C]`` with 0 from position ``lengths[b]`` on in row b; None: as it is."""
    return x if lengths is None else _fill_beyond(x, lengths, 0.0)


def kaldi_fbank(waves, lengths=None):
    """Log-mel filterbank as Kaldi computes it, with the paper's settings, after removal of each clip's mean.

    Equals ``torchaudio.compliance.kaldi.fbank(wave - wave.mean(), htk_compat=True, sample_frequency=16000,
    use_energy=False, window_type="hanning", num_mel_bins=128, dither=0.0, frame_shift=10)`` of each clip. Always
    computed in float32, autocast or not, and on the device of ``waves``.

    Args:
        waves: ``[B, L]``, 16 kHz mono; what lies beyond a clip's length does not matter.
        lengths: int64 ``[B]``, samples of each clip, at least 400; None: all have L.

    Returns:
        log-mel float32 ``[B, F, 128]`` with F = 1 + (L - 400) // 160 and ``LOG_FLOOR`` in the frames beyond a clip;
        the number of frames of each clip, int64 ``[B]``.

    Raises:
        UserError: a clip is shorter than 400 samples (25 ms). Lengths that are on a GPU are not checked, since that
            would make the host wait for it.
    """
    _check(waves, lengths)
    return _fbank(waves, lengths, None, _hanning(waves.device), _mel_filters(waves.device))


@dataclass(frozen=True)
class FeatureConfig:
    """How a waveform becomes a model's input; saved with every checkpoint.

    Attributes:
        frames: frames of the input: longer clips are cut, shorter ones padded.
        mean, std: statistics of the training data's log-mel; the input is ``(log_mel - mean) / (2 * std)``.
        padding: ``"min"``: pad the log-mel with its minimum, ``LOG_FLOOR`` (the paper's code); ``"zero"``: with 0 (AST,
            AudioMAE, Hugging Face). Both before normalisation.
    """

    frames: int
    mean: float
    std: float
    padding: str = "min"

    def __post_init__(self):
        if self.frames < 1:
            raise UserError(f"frames must be positive, got {self.frames}")
        if not self.std > 0 or not math.isfinite(self.std) or not math.isfinite(self.mean):
            raise UserError(f"mean and std must be finite and std positive, got mean={self.mean} std={self.std}")
        if self.padding not in ("min", "zero"):
            raise UserError(f'padding must be "min" or "zero", got {self.padding!r}')

    def to_dict(self):
        return asdict(self)

    @classmethod
    def from_dict(cls, values):
        return cls(**values)

    def to_hugging_face(self):
        """What ``preprocessor_config.json`` says to make Hugging Face's ``ASTFeatureExtractor`` do the same.

        It always pads with 0, so that a config whose padding is ``"min"`` has no equal: clips shorter than `frames`
        come out differently.
        """
        return {
            "feature_extractor_type": "ASTFeatureExtractor",
            "feature_size": 1,
            "sampling_rate": SAMPLE_RATE,
            "num_mel_bins": MEL_BINS,
            "max_length": self.frames,
            "do_normalize": True,
            "mean": self.mean,
            "std": self.std,
            "padding_value": 0.0,
            "padding_side": "right",
            "return_attention_mask": False,
        }

    @classmethod
    def from_hugging_face(cls, values):
        """The config whose features are those of an ``ASTFeatureExtractor``.

        Args:
            values: dict as ``preprocessor_config.json`` holds it, or ``extractor.to_dict()``. What is absent has
                Hugging Face's default.

        Raises:
            UserError: another extractor, sampling rate or number of mel bins.
        """
        only = {"feature_extractor_type": "ASTFeatureExtractor", "sampling_rate": SAMPLE_RATE, "num_mel_bins": MEL_BINS}
        for name, expected in only.items():
            if values.get(name, expected) != expected:
                raise UserError(f"{name}: the features here are those of {expected!r}, not of {values[name]!r}")
        if values.get("do_normalize", True):
            mean, std = values.get("mean", AUDIOSET_MEAN), values.get("std", AUDIOSET_STD)
        else:
            mean, std = 0.0, 0.5  # (x - 0) / (2 * 0.5)
        return cls(frames=values.get("max_length", 1024), mean=mean, std=std, padding="zero")


class FeatureExtractor(nn.Module):
    """Waveforms to the normalised log-mel that the models take, in float32 on the device of the waves.

    Its tables are buffers, so that it follows ``.to(device)``; they are not saved.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.register_buffer("window", _hanning("cpu"), persistent=False)
        self.register_buffer("mel", _mel_filters("cpu"), persistent=False)

    def forward(self, waves, lengths=None):
        """``[B, L]`` at 16 kHz and lengths ``[B]`` -> float32 ``[B, frames, 128]``; errors as ``kaldi_fbank``."""
        _check(waves, lengths)
        if self.mel.dtype != torch.float32:
            raise TypeError(f"FeatureExtractor computes in float32, but was converted to {self.mel.dtype}")
        config = self.config
        log_mel, frames = _fbank(waves, lengths, config.frames, self.window, self.mel)
        if config.padding == "zero":
            log_mel = zero_beyond(log_mel, frames)
        fill = LOG_FLOOR if config.padding == "min" else 0.0
        log_mel = F.pad(log_mel, (0, 0, 0, config.frames - log_mel.shape[1]), value=fill)  # [B, frames, 128]
        return (log_mel - config.mean) / (2 * config.std)

    def extra_repr(self):
        return repr(self.config)


def _check(waves, lengths):
    if waves.dim() != 2 or not waves.is_floating_point():
        raise ValueError(f"waves must be a float tensor [B, L], got {waves.dtype} {list(waves.shape)}")
    if lengths is not None and lengths.shape != waves.shape[:1]:
        raise ValueError(f"lengths must have one entry for each of the {len(waves)} clips, got {list(lengths.shape)}")
    shortest = waves.shape[1]
    if lengths is not None and lengths.device.type == "cpu" and not torch.compiler.is_compiling() and len(lengths):
        shortest, longest = int(lengths.min()), int(lengths.max())
        if longest > waves.shape[1]:
            raise ValueError(f"lengths has {longest}, but waves only {waves.shape[1]} samples")
    if shortest < WINDOW:
        raise UserError(f"a clip of {1000 * shortest / SAMPLE_RATE:.1f} ms is too short: needs at least 25 ms of sound")


def _fbank(waves, lengths, max_frames, window, mel):
    """``kaldi_fbank``, of the first ``max_frames`` frames only; the clip's mean is still that of the whole clip."""
    with torch.autocast(waves.device.type, enabled=False):
        waves = waves.float()
        mean = _clip_mean(waves, lengths)[:, None, None]  # [B, 1, 1]
        frames = waves.unfold(1, WINDOW, HOP)[:, :max_frames]  # [B, F, 400], a view
        if waves.device.type == "cpu" and not torch.compiler.is_compiling():
            parts = frames.split(max(1, _CHUNK // max(1, len(waves))), dim=1)
            log_mel = torch.cat([_log_mel(part - mean, window, mel) for part in parts], dim=1)
        else:
            log_mel = _log_mel(frames - mean, window, mel)  # [B, F, 128]
        if lengths is None:
            return log_mel, torch.full((len(waves),), log_mel.shape[1], device=waves.device)
        counts = 1 + (lengths.to(waves.device, non_blocking=True) - WINDOW) // HOP
        counts = counts.clamp(min=0, max=max_frames)
        return _fill_beyond(log_mel, counts, LOG_FLOOR), counts


def _clip_mean(waves, lengths):
    """Mean ``[B]`` of each clip over its own length."""
    if lengths is None:
        return waves.mean(dim=1)
    return zero_beyond(waves, lengths).sum(dim=1) / lengths.to(waves.device, non_blocking=True)


def _log_mel(frames, window, mel):
    """Frames ``[B, F, 400]`` to their log-mel ``[B, F, 128]``.

    The order of the steps is Kaldi's to the last rounding: where a bin's power is near the floor, rounding shows.
    """
    x = frames - frames.mean(dim=2, keepdim=True)
    # The first sample of a frame has none before it, but the window is 0 there, so it is 0 in any case.
    x = (x[:, :, 1:] - _PREEMPHASIS * x[:, :, :-1]) * window[1:]  # [B, F, 399]
    spectrum = torch.fft.rfft(F.pad(x, (1, _FFT - WINDOW)))  # [B, F, 257] complex
    power = spectrum.real.square() + spectrum.imag.square()
    return _exact_matmul(power, mel).clamp_min(torch.finfo(torch.float32).eps).log()


def _fill_beyond(x, lengths, value):
    beyond = torch.arange(x.shape[1], device=x.device) >= lengths.to(x.device, non_blocking=True)[:, None]  # [B, L]
    return x.masked_fill(beyond if x.dim() == 2 else beyond[:, :, None], value)


def _exact_matmul(power, mel):
    """float32 product also where the user lets matrix products drop to TF32 or bfloat16, which costs 1e-3 here."""
    if not torch.compiler.is_compiling() and torch.get_float32_matmul_precision() == "highest":
        return power @ mel
    return (power.double() @ mel.double()).float()  # a compiled graph cannot ask for the setting


# Made on the CPU for every device, to the same bits; never as inference tensors, which would outlive that mode.
@lru_cache
@torch.inference_mode(False)
def _hanning(device):
    return torch.hann_window(WINDOW, periodic=False, dtype=torch.float32, device="cpu").to(device)


@lru_cache
@torch.inference_mode(False)
def _mel_filters(device):
    """Triangles on the mel scale, float32 ``[257, 128]``: column m weighs the powers of the 257 FFT bins.

    In float32 throughout, as Kaldi does: the narrow filters at the bottom rest on one bin's small weight, so its
    rounding is part of what the features are.
    """
    low, high = mel(LOW_HZ), mel(HIGH_HZ)
    step = (high - low) / (MEL_BINS + 1)
    number = torch.arange(MEL_BINS, dtype=torch.float32, device="cpu")  # [128]
    left, centre, right = (low + (number + k) * step for k in (0.0, 1.0, 2.0))
    hertz = (SAMPLE_RATE / _FFT) * torch.arange(_FFT // 2, dtype=torch.float32, device="cpu")
    mels = (MEL_FACTOR * (1.0 + hertz / MEL_CORNER).log())[:, None]  # [256, 1]; Kaldi leaves the Nyquist bin out
    rising, falling = (mels - left) / (centre - left), (right - mels) / (right - centre)  # [256, 128]
    return F.pad(torch.minimum(rising, falling).clamp_min(0.0), (0, 0, 0, 1)).to(device)
