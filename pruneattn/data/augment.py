"""The paper's augmentations, on batches that may lie on any device.

Random numbers come from torch's global generator, so ``torch.manual_seed`` fixes them. All but the noise of single
spectrogram cells are drawn on the CPU: the same seed cuts, mixes and masks the same way on every device.
"""

from dataclasses import dataclass

import torch

from ..errors import UserError
from .fbank import remove_mean, zero_beyond

MAX_SHIFT = 10  # frames


def gain(waves):
    """Scale each clip of ``[B, L]`` by its own ``Beta(10, 10) + 0.5``: 0.5 to 1.5, mostly near 1."""
    return waves * (_beta(len(waves)) + 0.5).to(waves.device)[:, None]


def mixup(waves, lengths, targets, rate):
    """Mix waveforms, and their targets alike, as AST does: ``m * clip + (1 - m) * partner``, m from Beta(10, 10).

    Each clip loses its mean before they are mixed. The partner, another clip of the batch, is cut or padded with
    silence to the clip's length.

    Args:
        waves: float ``[B, L]``.
        lengths: int64 ``[B]``, samples of each clip; None: all have L.
        targets: float ``[B, K]``.
        rate: probability that a clip is mixed; the others pass unchanged.

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
    centred = remove_mean(waves, lengths)
    blend = zero_beyond(share * centred + (1 - share) * centred[partner], lengths)
    waves = torch.where(mixed.to(waves.device)[:, None], blend, waves)
    share, partner = share.to(targets.device), partner.to(targets.device)
    return waves, share * targets + (1 - share) * targets[partner]


def spec_augment(features, freq, time):
    """Blank one band of mel bins and one of frames in each clip (SpecAugment).

    The width of a band is uniform in ``[0, freq)`` or ``[0, time)`` and so is its place, as in torchaudio's
    ``FrequencyMasking`` and ``TimeMasking``. Blank is 0, which is the data's mean since features are normalised; AST
    masks before it normalises, and so fills with a louder ``-mean / (2 * std)``.

    Args:
        features: float ``[B, frames, 128]``, normalised.
        freq, time: width limits in mel bins and frames; 0 leaves that band out.
    """
    if time:
        features = features.masked_fill(_band(features, time, dim=1)[:, :, None], 0.0)
    if freq:
        features = features.masked_fill(_band(features, freq, dim=2)[:, None, :], 0.0)
    return features


def noise_and_shift(features):
    """Add ``U(0, 1) * U(0, 1) / 10`` to each cell (one factor per cell, one per clip), then rotate each clip in time by
    up to 10 frames either way.

    Args:
        features: float ``[B, frames, 128]``, normalised.
    """
    batch, frames, _ = features.shape
    level = torch.rand(batch).to(features.device)[:, None, None] / 10
    features = features + torch.rand_like(features) * level
    shift = torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, (batch, 1)).to(features.device)
    source = (torch.arange(frames, device=features.device) - shift) % frames  # [B, frames]
    return features.gather(1, source[:, :, None].expand_as(features))


def patch_mask_1d(batch, patches, ratio):
    """Random patches to keep: ``int(patches * (1 - ratio))`` of each clip.

    Returns:
        int64 ``[batch, kept]``, ascending, on the CPU.
    """
    return _subset(batch, patches, ratio)


def patch_mask_2d(batch, grid, time_ratio, freq_ratio):
    """Whole time columns and whole mel rows of patches to keep, in each clip its own.

    Of the ``grid = (columns, rows)`` of patches ``int(columns * (1 - time_ratio))`` columns and
    ``int(rows * (1 - freq_ratio))`` rows stay, and a patch stays when both its column and its row do.

    Returns:
        bool ``[batch, columns, rows]``, True where the patch stays, on the CPU.
    """
    columns, rows = (
        torch.zeros(batch, size, dtype=torch.bool).scatter_(1, _subset(batch, size, ratio), True)
        for size, ratio in zip(grid, (time_ratio, freq_ratio))
    )
    return columns[:, :, None] & rows[:, None, :]


@dataclass(frozen=True)
class Augment:
    """What to do to the training batches; the default is nothing.

    It holds no state: whether pruning has started is asked at every batch, and from then on SpecAugment and patch
    masking do nothing.

    Attributes:
        gain: random gain of the waveform.
        mixup: share of clips mixed with another one as waveforms.
        specaug_freq, specaug_time: SpecAugment's limits, in mel bins and in frames.
        noise: noise on the spectrogram and a shift in time.
        mask_time, mask_freq: share of columns and of rows of patches left out.
        mask_1d: share of single patches left out, instead of columns and rows.
    """

    gain: bool = False
    mixup: float = 0.0
    specaug_freq: int = 0
    specaug_time: int = 0
    noise: bool = False
    mask_time: float = 0.0
    mask_freq: float = 0.0
    mask_1d: float = 0.0

    def __post_init__(self):
        if not 0 <= self.mixup <= 1:
            raise UserError(f"mixup must be between 0 and 1, got {self.mixup}")
        for name in ("specaug_freq", "specaug_time"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be 0 (off) or more, got {getattr(self, name)}")
        for name in ("mask_time", "mask_freq", "mask_1d"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if self.mask_1d and (self.mask_time or self.mask_freq):
            raise UserError("mask_1d excludes mask_time and mask_freq: set it, or both of them, to 0")

    def waves(self, waves, lengths, targets):
        """Gain and mixup of waves ``[B, L]``, lengths ``[B]`` and targets ``[B, K]``; returns all three."""
        if self.gain:
            waves = gain(waves)
        if self.mixup:
            waves, targets = mixup(waves, lengths, targets, self.mixup)
        return waves, lengths, targets

    def features(self, x, pruning):
        """SpecAugment (until pruning starts) and noise with shift, of normalised features ``[B, frames, 128]``."""
        if not pruning:
            x = spec_augment(x, self.specaug_freq, self.specaug_time)
        return noise_and_shift(x) if self.noise else x

    def patches(self, model, batch, pruning):
        """Patches that the model shall process, ascending int64 ``[batch, kept]`` on its device; None: all."""
        if pruning or not (self.mask_1d or self.mask_time or self.mask_freq):
            return None
        if self.mask_1d:
            kept = patch_mask_1d(batch, model.num_patches, self.mask_1d)
        else:
            kept = model.patches_from_grid(patch_mask_2d(batch, model.grid, self.mask_time, self.mask_freq))
        return kept.to(next(model.parameters()).device, non_blocking=True)


def _beta(count):
    return torch.distributions.Beta(10.0, 10.0).sample((count,))


def _band(features, limit, dim):
    """One random band per clip along ``dim``: bool ``[B, size]``."""
    batch, size = len(features), features.shape[dim]
    width = torch.rand(batch, 1) * min(limit, size)
    start = (torch.rand(batch, 1) * (size - width)).long()
    start, end = start.to(features.device), (start + width.long()).to(features.device)
    position = torch.arange(size, device=features.device)
    return (position >= start) & (position < end)


def _subset(batch, size, ratio):
    """A random subset of ``range(size)`` for each clip, ascending ``[batch, int(size * (1 - ratio))]``, at least 1."""
    keep = max(1, int(round(size * (1 - ratio), 6)))  # rounded first: 20 * (1 - 0.9) is 1.9999999999999996
    return torch.rand(batch, size).argsort(dim=1)[:, :keep].sort(dim=1).values
