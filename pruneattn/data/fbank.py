"""Kaldi log-mel filterbank of a batch of waveforms, and the normalized input of the models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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

#: Smallest log-mel value, log(2^-23): Kaldi clamps the energies to float32's epsilon. Every clip reaches it, because
#: with these settings one mel filter (number 3) covers no FFT bin.
LOG_FLOOR = math.log(2.0**-23)

_FFT = 512
_CHUNK = 512  # frames processed at a time on a CPU; a whole batch would not fit into its cache
_PREEMPHASIS = 0.97


def samples_for(frames: int) -> int:
    """Number of samples at 16 kHz that give exactly ``frames`` frames."""
    return (frames - 1) * HOP + WINDOW


def remove_mean(waves: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Subtract each clip's mean over its own length, and set the padding to 0.

    Args:
        waves: float ``[B, L]``.
        lengths: int64 ``[B]``, samples of each clip; None: L for all clips.
    """
    return zero_beyond(waves - _clip_mean(waves, lengths)[:, None], lengths)


def zero_beyond(x: Tensor, lengths: Tensor | None) -> Tensor:
    """``x`` ``[B, L]`` or ``[B, L, C]`` with zeros from position ``lengths[b]`` on in row b; None: ``x`` unchanged."""
    return x if lengths is None else _fill_beyond(x, lengths, 0.0)


def kaldi_fbank(waves: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Log-mel filterbank as Kaldi computes it, with the paper's settings, after subtracting each clip's mean.

    Equals ``torchaudio.compliance.kaldi.fbank(wave - wave.mean(), htk_compat=True, sample_frequency=16000,
    use_energy=False, window_type="hanning", num_mel_bins=128, dither=0.0, frame_shift=10)`` of each clip.
    Computed in float32, also under autocast, on the device of ``waves``.

    Args:
        waves: ``[B, L]``, 16 kHz mono; samples beyond a clip's length are ignored.
        lengths: int64 ``[B]``, samples of each clip, at least 400; None: L for all clips.

    Returns:
        log-mel float32 ``[B, F, 128]`` with F = 1 + (L - 400) // 160 and ``LOG_FLOOR`` in the frames beyond a clip; and
        the number of frames of each clip, int64 ``[B]``.

    Raises:
        UserError: a clip is shorter than 400 samples (25 ms). Lengths on a GPU are not checked, because that
            would synchronize with the host.
    """
    _check(waves, lengths)
    return _fbank(waves, lengths, None, _hanning(waves.device), _mel_filters(waves.device))


@dataclass(frozen=True)
class FeatureConfig:
    """Transform from a waveform to a model's input; saved with every checkpoint.

    Attributes:
        frames: frames of the input. Longer clips are cut, shorter clips are padded.
        mean, std: statistics of the log-mel of the training data; the input is ``(log_mel - mean) / (2 * std)``.
        padding: value of the padding before normalization. ``"min"``: ``LOG_FLOOR``, the minimum of the log-mel (the
            paper's code); ``"zero"``: 0 (AST, AudioMAE, Hugging Face).
    """

    frames: int
    mean: float
    std: float
    padding: str = "min"

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise UserError(f"frames must be positive, got {self.frames}")
        if not self.std > 0 or not math.isfinite(self.std) or not math.isfinite(self.mean):
            raise UserError(f"mean and std must be finite and std positive, got mean={self.mean} std={self.std}")
        if self.padding not in ("min", "zero"):
            raise UserError(f'padding must be "min" or "zero", got {self.padding!r}')

    def to_dict(self) -> dict[str, Any]:
        """Plain values for :meth:`from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FeatureConfig:
        """Inverse of :meth:`to_dict`."""
        return cls(**values)

    def to_hugging_face(self) -> dict[str, Any]:
        """Content of ``preprocessor_config.json`` with which Hugging Face's ``ASTFeatureExtractor`` does the same.

        ``ASTFeatureExtractor`` always pads with 0. If ``padding`` is ``"min"``, its features of clips shorter than
        ``frames`` differ.
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
    def from_hugging_face(cls, values: Mapping[str, Any]) -> FeatureConfig:
        """The config with the same features as an ``ASTFeatureExtractor``.

        Args:
            values: content of ``preprocessor_config.json``, or ``extractor.to_dict()``. Missing keys have Hugging
                Face's defaults.

        Raises:
            UserError: the extractor, the sampling rate or the number of mel bins is not supported.
        """
        only = {"feature_extractor_type": "ASTFeatureExtractor", "sampling_rate": SAMPLE_RATE, "num_mel_bins": MEL_BINS}
        for name, expected in only.items():
            if values.get(name, expected) != expected:
                raise UserError(
                    f"{name}: expected {expected!r}, got {values[name]!r}; only these features are supported"
                )
        if values.get("do_normalize", True):
            mean, std = values.get("mean", AUDIOSET_MEAN), values.get("std", AUDIOSET_STD)
        else:
            mean, std = 0.0, 0.5  # (x - 0) / (2 * 0.5)
        return cls(frames=values.get("max_length", 1024), mean=mean, std=std, padding="zero")


class FeatureExtractor(nn.Module):
    """Convert waveforms to normalized log-mel spectrograms, in float32 on the device of the waves.

    Window and mel filters are buffers, so they follow ``.to(device)``; they are not saved.
    """

    window: Tensor
    mel: Tensor

    def __init__(self, config: FeatureConfig | None) -> None:
        super().__init__()
        if not isinstance(config, FeatureConfig):
            raise UserError(f"features: expected a FeatureConfig, got {config!r}; set the model's features")
        self.config = config
        self.register_buffer("window", _hanning("cpu"), persistent=False)
        self.register_buffer("mel", _mel_filters("cpu"), persistent=False)

    def forward(self, waves: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Compute float32 ``[B, frames, 128]`` of waves ``[B, L]`` at 16 kHz. Arguments and errors: ``kaldi_fbank``."""
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

    def extra_repr(self) -> str:
        """The config."""
        return repr(self.config)


def _check(waves: Tensor, lengths: Tensor | None) -> None:
    if waves.dim() != 2 or not waves.is_floating_point():
        raise ValueError(f"waves must be a float tensor [B, L], got {waves.dtype} {list(waves.shape)}")
    if lengths is not None and lengths.shape != waves.shape[:1]:
        raise ValueError(f"lengths must have one entry for each of the {len(waves)} clips, got {list(lengths.shape)}")
    shortest = waves.shape[1]
    if lengths is not None and lengths.device.type == "cpu" and not torch.compiler.is_compiling() and len(lengths):
        shortest, longest = int(lengths.min()), int(lengths.max())
        if longest > waves.shape[1]:
            raise ValueError(f"lengths: {longest} is more than the {waves.shape[1]} samples of waves")
    if shortest < WINDOW:
        raise UserError(f"a clip of {1000 * shortest / SAMPLE_RATE:.1f} ms is too short: at least 25 ms are needed")


def _fbank(
    waves: Tensor, lengths: Tensor | None, max_frames: int | None, window: Tensor, mel: Tensor
) -> tuple[Tensor, Tensor]:
    """``kaldi_fbank`` of the first ``max_frames`` frames. The subtracted mean is that of the whole clip."""
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


def _clip_mean(waves: Tensor, lengths: Tensor | None) -> Tensor:
    """Mean ``[B]`` of each clip over its own length."""
    if lengths is None:
        return waves.mean(dim=1)
    return zero_beyond(waves, lengths).sum(dim=1) / lengths.to(waves.device, non_blocking=True)


def _log_mel(frames: Tensor, window: Tensor, mel: Tensor) -> Tensor:
    """Log-mel ``[B, F, 128]`` of frames ``[B, F, 400]``.

    The steps have Kaldi's order, because rounding matters where the power of a bin is near the floor.
    """
    x = frames - frames.mean(dim=2, keepdim=True)
    # The first sample of a frame has no predecessor, but the window is 0 there.
    x = (x[:, :, 1:] - _PREEMPHASIS * x[:, :, :-1]) * window[1:]  # [B, F, 399]
    spectrum = torch.fft.rfft(F.pad(x, (1, _FFT - WINDOW)))  # [B, F, 257] complex
    power = spectrum.real.square() + spectrum.imag.square()
    return _exact_matmul(power, mel).clamp_min(torch.finfo(torch.float32).eps).log()


def _fill_beyond(x: Tensor, lengths: Tensor, value: float) -> Tensor:
    beyond = torch.arange(x.shape[1], device=x.device) >= lengths.to(x.device, non_blocking=True)[:, None]  # [B, L]
    return x.masked_fill(beyond if x.dim() == 2 else beyond[:, :, None], value)


def _exact_matmul(power: Tensor, mel: Tensor) -> Tensor:
    """Product in full float32, also if the user allows TF32 or bfloat16, whose error would be 1e-3 here."""
    if not torch.compiler.is_compiling() and torch.get_float32_matmul_precision() == "highest":
        return power @ mel
    return (power.double() @ mel.double()).float()  # a compiled graph cannot read the setting


# Computed on the CPU, so that every device has the same bits. Not inference tensors, because the cache outlives that
# mode.
@lru_cache
@torch.inference_mode(False)
def _hanning(device: torch.device | str) -> Tensor:
    return torch.hann_window(WINDOW, periodic=False, dtype=torch.float32, device="cpu").to(device)


@lru_cache
@torch.inference_mode(False)
def _mel_filters(device: torch.device | str) -> Tensor:
    """Triangular filters on the mel scale, float32 ``[257, 128]``: column m has the weights of the 257 FFT bins.

    Computed in float32, as in Kaldi: the narrow low filters have one bin with a small weight, so its rounding changes
    the features.
    """
    low, high = mel(LOW_HZ), mel(HIGH_HZ)
    step = (high - low) / (MEL_BINS + 1)
    number = torch.arange(MEL_BINS, dtype=torch.float32, device="cpu")  # [128]
    left, center, right = (low + (number + k) * step for k in (0.0, 1.0, 2.0))
    hertz = (SAMPLE_RATE / _FFT) * torch.arange(_FFT // 2, dtype=torch.float32, device="cpu")
    mels = (MEL_FACTOR * (1.0 + hertz / MEL_CORNER).log())[:, None]  # [256, 1]; Kaldi omits the Nyquist bin
    rising, falling = (mels - left) / (center - left), (right - mels) / (right - center)  # [256, 128]
    return F.pad(torch.minimum(rising, falling).clamp_min(0.0), (0, 0, 0, 1)).to(device)
