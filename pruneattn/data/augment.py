"""The paper's augmentations, on batches on any device.

Random numbers come from torch's global generator, so ``torch.manual_seed`` fixes them. They are drawn on the CPU,
except the noise of the spectrogram cells: the same seed gives the same cuts, mixtures and masks on every device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .fbank import remove_mean, zero_beyond

MAX_SHIFT = 10  # frames


def gain(waves: Tensor) -> Tensor:
    """Scale each clip of ``[B, L]`` by a random factor ``Beta(10, 10) + 0.5``: 0.5 to 1.5, mostly near 1."""
    return waves * (_beta(len(waves)) + 0.5).to(waves.device)[:, None]


def mixup(waves: Tensor, lengths: Tensor | None, targets: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """Mix waveforms and their targets, as AST does: ``m * clip + (1 - m) * partner``, m from Beta(10, 10).

    The mean of each clip is subtracted before mixing. The partner, another clip of the batch, is cut or padded with
    silence to the length of the clip.

    Args:
        waves: float ``[B, L]``.
        lengths: int64 ``[B]``, samples of each clip; None: L for all clips.
        targets: float ``[B, K]``.
        rate: probability that a clip is mixed.

    Returns:
        waves ``[B, L]`` and targets ``[B, K]``.
    """
    batch = len(waves)
    mixed = torch.rand(batch) < rate
    share = torch.where(mixed, _beta(batch), 1.0)[:, None]  # [B, 1]
    order = torch.randperm(batch)
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)  # along a random cycle, so that no clip is its own partner

    share, partner = share.to(waves.device), partner.to(waves.device)
    centered = remove_mean(waves, lengths)
    blend = zero_beyond(share * centered + (1 - share) * centered[partner], lengths)
    waves = torch.where(mixed.to(waves.device)[:, None], blend, waves)
    share, partner = share.to(targets.device), partner.to(targets.device)
    return waves, share * targets + (1 - share) * targets[partner]


def spec_augment(features: Tensor, freq: int, time: int) -> Tensor:
    """Mask one band of mel bins and one band of frames in each clip (SpecAugment).

    The width of a band is uniform in ``[0, freq)`` or ``[0, time)``, and so is its position, as in torchaudio's
    ``FrequencyMasking`` and ``TimeMasking``. The mask value is 0, the mean of normalized features. AST masks before
    normalization, which gives a louder ``-mean / (2 * std)``.

    Args:
        features: float ``[B, frames, 128]``, normalized.
        freq, time: limits of the width in mel bins and frames; 0 turns that mask off.
    """
    if time:
        features = features.masked_fill(_band(features, time, dim=1)[:, :, None], 0.0)
    if freq:
        features = features.masked_fill(_band(features, freq, dim=2)[:, None, :], 0.0)
    return features


def noise_and_shift(features: Tensor) -> Tensor:
    """Add noise and shift in time.

    ``U(0, 1) * U(0, 1) / 10`` is added to each cell (one factor per cell, one per clip). Then each clip is rotated in
    time by up to 10 frames in either direction.

    Args:
        features: float ``[B, frames, 128]``, normalized.
    """
    batch, frames, _ = features.shape
    level = torch.rand(batch).to(features.device)[:, None, None] / 10
    features = features + torch.rand_like(features) * level
    shift = torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, (batch, 1)).to(features.device)
    source = (torch.arange(frames, device=features.device) - shift) % frames  # [B, frames]
    return features.gather(1, source[:, :, None].expand_as(features))


def patch_mask_1d(batch: int, patches: int, ratio: float) -> Tensor:
    """Random patches to keep: ``int(patches * (1 - ratio))`` of each clip.

    Returns:
        int64 ``[batch, kept]``, ascending, on the CPU.
    """
    return _subset(batch, patches, ratio)


def patch_mask_2d(batch: int, grid: tuple[int, int], time_ratio: float, freq_ratio: float) -> Tensor:
    """Whole time columns and whole mel rows of patches to keep, drawn for each clip.

    Of the ``grid = (columns, rows)`` of patches, ``int(columns * (1 - time_ratio))`` columns and
    ``int(rows * (1 - freq_ratio))`` rows are kept. A patch is kept if its column and its row are. Where patches
    overlap, kept neighbors still contain some of the cells of a masked patch.

    Returns:
        bool ``[batch, columns, rows]``, True for kept patches, on the CPU.
    """
    columns, rows = (
        torch.zeros(batch, size, dtype=torch.bool).scatter_(1, _subset(batch, size, ratio), True)
        for size, ratio in zip(grid, (time_ratio, freq_ratio))
    )
    return columns[:, :, None] & rows[:, None, :]


@dataclass(frozen=True)
class Augment:
    """Augmentations of the training batches; all are off by default.

    It is stateless: every batch passes whether pruning has started. From then on, SpecAugment and patch masking are
    off.

    Attributes:
        gain: random gain of the waveform.
        mixup: fraction of clips that are mixed with another clip as waveforms.
        specaug_freq, specaug_time: limits of SpecAugment, in mel bins and frames.
        noise: noise on the spectrogram and a shift in time.
        mask_time, mask_freq: fractions of columns and rows of patches that are masked.
        mask_1d: fraction of single patches that are masked, instead of columns and rows.
    """

    gain: bool = False
    mixup: float = 0.0
    specaug_freq: int = 0
    specaug_time: int = 0
    noise: bool = False
    mask_time: float = 0.0
    mask_freq: float = 0.0
    mask_1d: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.mixup <= 1:
            raise UserError(f"mixup must be between 0 and 1, got {self.mixup}")
        for name in ("specaug_freq", "specaug_time"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be 0 (off) or more, got {getattr(self, name)}")
        for name in ("mask_time", "mask_freq", "mask_1d"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if self.mask_1d and (self.mask_time or self.mask_freq):
            raise UserError(
                "mask_1d excludes mask_time and mask_freq: set mask_1d to 0, or both of mask_time and mask_freq"
            )

    def waves(self, waves: Tensor, lengths: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Apply gain and mixup to waves ``[B, L]``, lengths ``[B]`` and targets ``[B, K]``; return all three."""
        if self.gain:
            waves = gain(waves)
        if self.mixup:
            waves, targets = mixup(waves, lengths, targets, self.mixup)
        return waves, lengths, targets

    def features(self, x: Tensor, pruning: bool) -> Tensor:
        """Apply SpecAugment (until pruning starts), noise and shift to normalized features ``[B, frames, 128]``."""
        if not pruning:
            x = spec_augment(x, self.specaug_freq, self.specaug_time)
        return noise_and_shift(x) if self.noise else x

    def patches(self, model: Any, batch: int, pruning: bool) -> Tensor | None:
        """Patches that the model has to process, ascending int64 ``[batch, kept]`` on its device; None: all.

        Args:
            model: ``PrunedViT``.
            batch: number of clips.
            pruning: whether pruning has started.
        """
        if pruning or not (self.mask_1d or self.mask_time or self.mask_freq):
            return None
        if self.mask_1d:
            kept = patch_mask_1d(batch, model.num_patches, self.mask_1d)
        else:
            kept = model.patches_from_grid(patch_mask_2d(batch, model.grid, self.mask_time, self.mask_freq))
        return kept.to(next(model.parameters()).device, non_blocking=True)


def _beta(count: int) -> Tensor:
    return torch.distributions.Beta(10.0, 10.0).sample((count,))


def _band(features: Tensor, limit: int, dim: int) -> Tensor:
    """One random band per clip along ``dim``: bool ``[B, size]``."""
    batch, size = len(features), features.shape[dim]
    width = torch.rand(batch, 1) * min(limit, size)
    start = (torch.rand(batch, 1) * (size - width)).long()
    start, end = start.to(features.device), (start + width.long()).to(features.device)
    position = torch.arange(size, device=features.device)
    return (position >= start) & (position < end)


def _subset(batch: int, size: int, ratio: float) -> Tensor:
    """A random subset of ``range(size)`` for each clip, ascending ``[batch, int(size * (1 - ratio))]``, at least 1."""
    keep = max(1, int(round(size * (1 - ratio), 6)))  # rounded first: 20 * (1 - 0.9) is 1.9999999999999996
    return torch.rand(batch, size).argsort(dim=1)[:, :keep].sort(dim=1).values
