import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pruneattn.data import augment
from pruneattn.data.augment import Augment
from pruneattn.errors import UserError
from pruneattn.models import create_model


def seeded(function, *arguments):
    torch.manual_seed(3)
    return function(*arguments)


class Grid(nn.Module):
    """The interface of a model for patch masking: 16 x 8 patches, frequency-major as AST or time-major as AudioMAE."""

    def __init__(self, time_major):
        super().__init__()
        self.time_major, self.grid, self.num_patches = time_major, (16, 8), 128
        self.weight = nn.Parameter(torch.zeros(1))

    def patches_from_grid(self, mask):
        mask = mask if self.time_major else mask.transpose(1, 2)
        return torch.stack([row.flatten().nonzero().flatten() for row in mask])

    def position(self, patch):
        return (patch // 8, patch % 8) if self.time_major else (patch % 16, patch // 16)


def test_gain_is_beta_plus_half_per_clip():
    waves = torch.randn(4000, 3)
    factor = seeded(augment.gain, waves) / waves
    torch.testing.assert_close(factor, factor[:, :1].expand(-1, 3))
    factor = factor[:, 0]
    assert factor.min() > 0.5 and factor.max() < 1.5
    assert factor.mean().item() == pytest.approx(1.0, abs=0.01)
    assert factor.var().item() == pytest.approx(1 / 84, rel=0.1)  # variance of Beta(10, 10): 0.25 / 21


def test_mixup_mixes_waves_and_targets_by_the_same_fraction():
    batch = 64
    waves = torch.randn(batch, 500)
    waves -= waves.mean(1, keepdim=True)
    targets = torch.eye(batch)
    mixed, soft = seeded(augment.mixup, waves, None, targets, 1.0)
    torch.testing.assert_close(soft.sum(1), torch.ones(batch))
    # One-hot targets identify clip, partner and fraction.
    torch.testing.assert_close(mixed, soft @ waves, rtol=0, atol=1e-5)
    assert ((soft > 0).sum(1) == 2).all() and (soft.diagonal() > 0).all()  # a clip is never its own partner
    partners = (soft - torch.diag(soft.diagonal())).argmax(1)
    assert partners.sort().values.tolist() == list(range(batch))
    share = soft.diagonal()
    assert share.mean().item() == pytest.approx(0.5, abs=0.05) and 0.05 < share.std() < 0.2


def test_mixup_rate_is_per_clip():
    waves, targets = torch.randn(2000, 4) + 5, torch.eye(2000)
    mixed, soft = seeded(augment.mixup, waves, None, targets, 0.3)
    alone = soft.diagonal() == 1
    assert (~alone).float().mean().item() == pytest.approx(0.3, abs=0.04)
    assert (mixed[alone] == waves[alone]).all() and (mixed[~alone] != waves[~alone]).any(1).all()
    for rate, same in ((0.0, True), (1.0, False)):
        assert (seeded(augment.mixup, waves, None, targets, rate)[0] == waves).all().item() is same


def test_mixup_cuts_and_pads_the_partner_to_the_clips_length():
    lengths = torch.tensor([40, 100, 70, 100])
    waves = torch.randn(4, 100) + 2
    inside = torch.arange(100) < lengths[:, None]
    waves[~inside] = float("nan")  # values beyond the end of a clip must not be mixed in
    mixed, soft = seeded(augment.mixup, waves, lengths, torch.eye(4), 1.0)
    means = waves.nan_to_num().sum(1, keepdim=True) / lengths[:, None]
    silent_beyond = (waves - means).nan_to_num()
    torch.testing.assert_close(mixed, (soft @ silent_beyond) * inside, rtol=0, atol=1e-5)
    assert (mixed[~inside] == 0).all()


def test_mixup_of_a_single_clip_is_the_clip():
    wave, target = torch.randn(1, 100), torch.ones(1, 3)
    mixed, soft = augment.mixup(wave, torch.tensor([100]), target, 1.0)
    torch.testing.assert_close(mixed, wave - wave.mean())
    torch.testing.assert_close(soft, target)


def test_spec_augment_masks_one_band_per_axis():
    x = torch.full((3000, 64, 128), 7.0)
    y = seeded(augment.spec_augment, x, 48, 16)
    blank = y == 0
    assert ((y == 7) | blank).all() and (x == 7).all()
    mel, frame = blank.all(1), blank.all(2)  # [B, 128], [B, 64]
    torch.testing.assert_close(blank, mel[:, None, :] | frame[:, :, None])
    for band, limit in ((mel, 48), (frame, 16)):
        width = band.sum(1)
        assert width.min() == 0 and width.max() == limit - 1
        assert width.double().mean().item() == pytest.approx((limit - 1) / 2, rel=0.05)
        edges = (band[:, 1:] != band[:, :-1]).sum(1) + band[:, 0].long() + band[:, -1].long()
        assert (edges[width > 0] == 2).all()  # contiguous
        assert band[:, :-1].any(0).all()  # every position can be masked (the last position rarely, as in torchaudio)
        start = band.int().argmax(1)[width > 0].double()
        assert start.mean().item() == pytest.approx((band.shape[1] - limit / 2) / 2, rel=0.06)
    assert len(set(mel.sum(1).tolist())) == 48  # each clip has its own bands


def test_spec_augment_limits():
    x = torch.ones(4, 16, 128)
    assert (augment.spec_augment(x, 0, 0) == x).all()
    assert (augment.spec_augment(x, 0, 8).std(2) == 0).all()  # time only: whole frames
    assert (augment.spec_augment(x, 8, 0).std(1) == 0).all()
    assert augment.spec_augment(x, 500, 500).shape == x.shape  # wider than the input is clipped to it


def test_noise_is_added_within_its_bounds():
    y = seeded(augment.noise_and_shift, torch.zeros(2000, 20, 16))
    assert y.min() >= 0 and y.max() < 0.1
    level = y.flatten(1).max(1).values  # nearly the clip's factor, which is uniform in [0, 0.1)
    assert level.mean().item() == pytest.approx(0.05, abs=0.003)
    assert level.std().item() == pytest.approx(0.0289, abs=0.002)
    share = y.flatten(1) / level[:, None]
    assert share.mean().item() == pytest.approx(0.5, abs=0.01) and share.std().item() == pytest.approx(0.289, abs=0.01)


def test_shift_rotates_each_clip_by_up_to_ten_frames():
    x = 100.0 * torch.arange(64)[None, :, None].expand(1000, 64, 4)
    y = seeded(augment.noise_and_shift, x)
    shift = y[:, :, 0].argmin(1)  # where frame 0 went
    shift = torch.where(shift > 32, shift - 64, shift)
    assert sorted(set(shift.tolist())) == list(range(-10, 11))
    for clip, by in zip(y[:50], shift[:50].tolist()):
        assert ((clip - x[0].roll(by, 0)).abs() < 0.1).all()


def test_patch_mask_1d():
    kept = seeded(augment.patch_mask_1d, 500, 128, 0.3)
    assert kept.shape == (500, 89) and kept.dtype == torch.int64
    assert (kept.diff(dim=1) > 0).all() and kept.min() == 0 and kept.max() == 127
    share = torch.zeros(500, 128).scatter_(1, kept, 1.0).mean(0)
    assert share.mean().item() == pytest.approx(89 / 128) and (share - 89 / 128).abs().max() < 0.1
    assert (kept[0] != kept[1]).any()


def test_patch_mask_2d_masks_whole_columns_and_rows():
    mask = seeded(augment.patch_mask_2d, 200, (64, 8), 0.3, 0.3)
    assert mask.shape == (200, 64, 8) and mask.dtype == torch.bool
    columns, rows = mask.any(2), mask.any(1)
    assert (columns.sum(1) == 44).all() and (rows.sum(1) == 5).all()  # int(64 * 0.7), int(8 * 0.7)
    torch.testing.assert_close(mask, columns[:, :, None] & rows[:, None, :])
    assert columns.any(0).all() and not columns.all(0).any() and (columns[0] != columns[1]).any()


@pytest.mark.parametrize("size, ratio, kept", [(20, 0.9, 2), (10, 0.3, 7), (8, 0.3, 5), (8, 0.99, 1), (8, 0.0, 8)])
def test_number_of_patches_kept(size, ratio, kept):
    assert augment.patch_mask_1d(1, size, ratio).shape == (1, kept)


@pytest.mark.parametrize("time_major", [True, False])
def test_patches_follow_the_models_token_order(time_major):
    model = Grid(time_major)
    patches = seeded(Augment(mask_time=0.5, mask_freq=0.25).patches, model, 6, False)
    assert patches.shape == (6, 8 * 6) and (patches.diff(dim=1) > 0).all()
    for clip in patches:
        columns, rows = (set(part.tolist()) for part in model.position(clip))
        assert len(columns) == 8 and len(rows) == 6
    same_mask = seeded(augment.patch_mask_2d, 6, (16, 8), 0.5, 0.25)
    assert (patches == model.patches_from_grid(same_mask)).all()
    assert Augment(mask_1d=0.5).patches(model, 6, False).shape == (6, 64)


@pytest.mark.parametrize("frames, stride", [(121, 10), (100, (10, 16)), (100, 16)])
def test_masks_of_a_model_with_any_stride(frames, stride):
    model = create_model("ast_tiny", embed_dim=24, depth=1, num_heads=1, prune_blocks=(), frames=frames, stride=stride)
    columns, rows = model.grid
    patches = seeded(Augment(mask_time=0.5, mask_freq=0.25).patches, model, 4, False)
    assert patches.shape == (4, int(columns * 0.5) * int(rows * 0.75)) and (patches.diff(dim=1) > 0).all()
    for clip in patches.tolist():
        kept = {(patch % columns, patch // columns) for patch in clip}  # mel row by mel row
        times, mels = ({place[axis] for place in kept} for axis in (0, 1))
        assert kept == {(time, mel) for time in times for mel in mels} and max(times) < columns and max(mels) < rows
    assert model(torch.randn(4, frames, 128), patches).shape == (4, 527)
    assert Augment(mask_1d=0.5).patches(model, 4, False).shape == (4, columns * rows // 2)


FULL = dict(gain=True, mixup=0.5, specaug_freq=48, specaug_time=24, noise=True, mask_time=0.3, mask_freq=0.3)


def test_masks_stop_as_soon_as_pruning_starts():
    model, x = Grid(True), torch.ones(32, 64, 128)
    quiet = Augment(**{**FULL, "noise": False})
    for pruning in (False, True, False, True):  # nothing is remembered between batches
        assert (quiet.features(x, pruning) == 0).any().item() is not pruning
        assert (quiet.patches(model, 4, pruning) is None) is pruning
        assert (Augment(mask_1d=0.5).patches(model, 4, pruning) is None) is pruning
    noisy = Augment(**FULL).features(x, True)
    assert (noisy >= 1).all() and (noisy > 1).any()  # noise continues


def test_everything_is_off_by_default():
    nothing, waves, targets, x = Augment(), torch.randn(3, 50), torch.eye(3), torch.randn(3, 16, 128)
    lengths = torch.tensor([50, 40, 30])
    same = nothing.waves(waves, lengths, targets)
    assert same[0] is waves and same[1] is lengths and same[2] is targets
    assert nothing.features(x, False) is x and nothing.patches(Grid(True), 3, False) is None


def test_the_same_seed_gives_the_same_result():
    everything, model = Augment(**FULL), Grid(False)
    waves, lengths, targets = torch.randn(8, 900), torch.tensor([900, 500] * 4), torch.eye(8)

    def run():
        mixed, _, soft = everything.waves(waves, lengths, targets)
        return mixed, soft, everything.features(torch.ones(8, 64, 128), False), everything.patches(model, 8, False)

    first, again, other = seeded(run), seeded(run), run()
    for a, b, c in zip(first, again, other):
        assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize(
    "field, value",
    [("mixup", 1.5), ("mixup", -0.1), ("specaug_freq", -1), ("mask_time", 1.0), ("mask_freq", -0.5), ("mask_1d", 2.0)],
)
def test_invalid_settings_are_rejected(field, value):
    with pytest.raises(UserError, match=field):
        Augment(**{field: value})


def test_masking_is_either_1d_or_2d():
    with pytest.raises(UserError, match="mask_1d excludes"):
        Augment(mask_1d=0.3, mask_freq=0.3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Augment().noise = True


@pytest.mark.device
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_same_seed_gives_the_same_masks_and_mixtures_on_the_gpu():
    everything, model = Augment(**{**FULL, "noise": False}), Grid(True)
    waves, lengths, targets, x = torch.randn(8, 900), torch.tensor([900, 500] * 4), torch.eye(8), torch.ones(8, 64, 128)

    def run(device):
        mixed, _, soft = everything.waves(waves.to(device), lengths, targets.to(device))
        parts = mixed, soft, everything.features(x.to(device), False), everything.patches(model.to(device), 8, False)
        assert all(part.device.type == device for part in parts)
        return SimpleNamespace(mixed=mixed.cpu(), rest=[part.cpu() for part in parts[1:]])

    on_cpu, on_gpu = seeded(run, "cpu"), seeded(run, "cuda")
    torch.testing.assert_close(on_gpu.mixed, on_cpu.mixed)
    for a, b in zip(on_cpu.rest, on_gpu.rest):
        torch.testing.assert_close(a, b)


def test_spec_augment_draws_as_torchaudio_does():
    transforms = pytest.importorskip("torchaudio.transforms")
    x = torch.ones(20000, 32, 128)
    ours = seeded(augment.spec_augment, x, 48, 0)[:, 0] == 0  # [B, 128]
    theirs = transforms.FrequencyMasking(48, iid_masks=True)(x[:, None, :1].transpose(2, 3))[:, 0, :, 0] == 0
    assert (ours.double().mean(0) - theirs.double().mean(0)).abs().max() < 0.02
    widths = [torch.bincount(masks.sum(1), minlength=48) / 20000 for masks in (ours, theirs)]
    assert (widths[0] - widths[1]).abs().max() < 0.008
