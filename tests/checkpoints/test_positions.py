import pytest
import torch
import torch.nn.functional as F

from pruneattn.checkpoints.positions import fit_positions, guess_stride
from pruneattn.errors import UserError
from pruneattn.models import create_model

EXTRA = {"ast": 2, "audiomae": 1}


def make(family, frames, stride=16):
    sizes = {"embed_dim": 4, "depth": 1, "num_heads": 1, "prune_blocks": ()}
    return create_model(f"{family}_tiny", frames=frames, stride=stride, **sizes)


def numbered(family, patches):
    """A table whose patch k has the value k, and whose extra tokens -1, -2."""
    values = torch.cat([-1 - torch.arange(EXTRA[family]), torch.arange(patches)])
    return values.float().reshape(1, -1, 1).repeat(1, 1, 4)


def values(table, family):
    """The values of the extra tokens and of the patches, as lists."""
    assert table.dtype == torch.float32 and table.shape[0] == 1 and (table == table[..., :1]).all()
    column = table[0, :, 0].tolist()
    return column[: EXTRA[family]], column[EXTRA[family] :]


@pytest.mark.parametrize("family", ["ast", "audiomae"])
def test_a_table_of_the_same_grid_is_unchanged(family):
    table = numbered(family, 512)
    fitted, note = fit_positions(table, make(family, 1024))
    assert torch.equal(fitted, table) and note == ""


@pytest.mark.parametrize(("frames", "start"), [(128, 28), (512, 16), (16, 32), (48, 31)])
def test_ast_uses_the_center_columns(frames, start):
    columns = frames // 16
    fitted, note = fit_positions(numbered("ast", 512), make("ast", frames))
    expected = [64 * row + start + column for row in range(8) for column in range(columns)]
    assert values(fitted, "ast") == ([-1, -2], expected)
    assert note == f"positions: center crop of 64 time columns to {columns}"


@pytest.mark.parametrize("frames", [128, 512, 1008])
def test_audiomae_uses_the_left_columns_of_8_by_64(frames):
    columns = frames // 16
    fitted, note = fit_positions(numbered("audiomae", 512), make("audiomae", frames))
    expected = [64 * row + column for row in range(8) for column in range(columns)]
    assert values(fitted, "audiomae") == ([-1], expected)
    assert note == f"positions: left crop of 64 time columns to {columns}"


@pytest.mark.parametrize("family", ["ast", "audiomae"])
def test_two_crops_equal_one_crop(family):
    half, _ = fit_positions(numbered(family, 512), make(family, 512))
    twice, _ = fit_positions(half, make(family, 128))
    once, _ = fit_positions(numbered(family, 512), make(family, 128))
    assert torch.equal(twice, once)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("had", "frames"), [(1024, 512), (1024, 128), (128, 1024)])
def test_a_sine_cosine_table_of_this_package_is_recomputed(had, frames, stored):
    source, model = make("audiomae", had), make("audiomae", frames)
    table = source.pos_embed.detach().clone()
    table[0, 0] = 3.0
    fitted, note = fit_positions(table.to(stored), model)
    assert torch.equal(fitted[:, 1:], model.pos_embed[:, 1:]) and (fitted[0, 0] == 3).all()
    assert "sine-cosine" in note


@pytest.mark.parametrize("family", ["ast", "audiomae"])
@pytest.mark.parametrize(("patches", "frames"), [(512, 1536), (64, 512), (8, 48)])
def test_more_columns_are_interpolated_bilinearly(family, patches, frames):
    extra = EXTRA[family]
    table = torch.randn(1, extra + patches, 4)
    with pytest.warns(UserWarning, match=f"{patches // 8} time columns interpolated to {frames // 16}"):
        fitted, note = fit_positions(table, make(family, frames))
    grid = table[:, extra:].transpose(1, 2).reshape(1, 4, 8, patches // 8)
    expected = F.interpolate(grid, size=(8, frames // 16), mode="bilinear").flatten(2).transpose(1, 2)
    torch.testing.assert_close(fitted[:, extra:], expected)
    assert torch.equal(fitted[:, :extra], table[:, :extra])
    assert "interpolated" in note


@pytest.mark.parametrize(("patches", "frames"), [(1212, 1024), (600, 512), (144, 128)])
def test_stride_10_is_read_at_the_centers_of_stride_16(patches, frames):
    had, columns = patches // 12, frames // 16
    rows, times = torch.meshgrid(torch.arange(12.0), torch.arange(float(had)), indexing="ij")
    # The values are the positions in mel bins and frames; bilinear interpolation must reproduce them.
    place = torch.stack([10 * rows, 10 * times, 10 * rows + 20 * times, torch.ones_like(rows)], dim=-1)
    table = torch.cat([torch.full((1, 2, 4), -1.0), place.reshape(1, patches, 4)], dim=1)
    with pytest.warns(UserWarning, match="stride 10"):
        fitted, note = fit_positions(table, make("ast", frames), stride=None)
    grid = fitted[0, 2:].reshape(8, columns, 4)
    # The last row has the value of the 12th row of the table.
    bins = (16.0 * torch.arange(8)).clamp(max=110).reshape(8, 1).expand(8, columns)
    start = (16.0 * torch.arange(columns)).clamp(max=10.0 * (had - 1)).expand(8, columns)
    torch.testing.assert_close(grid, torch.stack([bins, start, bins + 2 * start, torch.ones_like(bins)], dim=-1))
    assert (fitted[:, :2] == -1).all() and f"12 x {had}" in note


@pytest.mark.parametrize("frames", range(128, 1200, 7))
def test_a_known_stride_determines_the_grid(frames):
    """Positions for any number of frames; the value of a column is the frame in which it begins."""
    columns, rows = (frames - 16) // 10 + 1, torch.arange(12.0)
    grid = torch.stack([10 * rows.reshape(12, 1).expand(-1, columns), 10 * torch.arange(columns).expand(12, -1)], -1)
    table = torch.cat([torch.zeros(1, 2, 2), grid.reshape(1, -1, 2).float()], 1)
    model = make("ast", frames // 16 * 16)
    for stride in (10, None):
        if stride is None and frames // 16 * 16 != frames:
            continue  # the size is unambiguous only for a multiple of 16 frames
        with pytest.warns(UserWarning, match="stride 10"):
            fitted, note = fit_positions(table, model, stride=stride)
        assert "crop" not in note
        start = (16.0 * torch.arange(frames // 16)).clamp(max=10.0 * (columns - 1))
        torch.testing.assert_close(fitted[0, 2:, 1].reshape(8, -1), start.expand(8, -1))


def test_a_table_of_known_stride_16_is_not_resampled():
    """600 patches are 12 x 50 with stride 10, but 8 x 75 of 1200 frames."""
    fitted, note = fit_positions(numbered("ast", 600), make("ast", 512), stride=16)
    assert values(fitted, "ast")[1] == [75 * row + 21 + column for row in range(8) for column in range(32)]
    assert note == "positions: center crop of 75 time columns to 32"
    same, note = fit_positions(numbered("ast", 600), make("ast", 1200), stride=None)
    assert values(same, "ast")[1] == list(range(600)) and note == ""
    with pytest.warns(UserWarning, match="^positions: ") as caught:
        fit_positions(numbered("ast", 600), make("ast", 1200), stride=10)
    resampled, stretched = (str(warning.message) for warning in caught)
    assert "stride 10: its 12 x 50 positions resampled to 8 x 32" in resampled
    assert stretched == "positions: 32 time columns interpolated to 75; fine-tune the model before you use it"


def test_stride_10_is_resampled_before_the_crop():
    table = torch.randn(1, 1214, 4)
    with pytest.warns(UserWarning, match="stride 10"):
        full, _ = fit_positions(table, make("ast", 1024), stride=None)
    with pytest.warns(UserWarning, match="stride 10"):
        short, note = fit_positions(table, make("ast", 128), stride=None)
    cropped, _ = fit_positions(full, make("ast", 128))
    assert torch.equal(short, cropped)
    assert "12 x 101" in note and "center crop of 64 time columns to 8" in note


def test_stride_16_is_the_default():
    # 144 patches are 12 x 12 with stride 10, but 8 x 18 with stride 16.
    fitted, note = fit_positions(numbered("ast", 144), make("ast", 256))
    expected = [18 * row + 1 + column for row in range(8) for column in range(16)]
    assert values(fitted, "ast")[1] == expected and "crop" in note


# Any stride ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [10, (10, 16), (16, 10), (7, 5), 1])
def test_a_table_of_the_same_stride_is_unchanged_or_cropped(stride):
    model = make("ast", 100, stride)
    columns, rows = model.grid
    fitted, note = fit_positions(numbered("ast", rows * columns), model, stride=stride)
    assert values(fitted, "ast")[1] == list(range(rows * columns)) and note == ""
    shorter = make("ast", 60, stride)
    fitted, note = fit_positions(numbered("ast", rows * columns), shorter, stride=stride)
    start = columns // 2 - shorter.grid[0] // 2
    cropped = [columns * row + start + column for row in range(rows) for column in range(shorter.grid[0])]
    assert values(fitted, "ast")[1] == cropped and f"crop of {columns} time columns to {shorter.grid[0]}" in note
    with pytest.warns(UserWarning, match=f"{shorter.grid[0]} time columns interpolated to {columns}"):
        stretched, _ = fit_positions(fitted, model, stride=stride)
    assert stretched.shape[1] == 2 + rows * columns


@pytest.mark.parametrize("frames", [128, 250, 1024])
@pytest.mark.parametrize(
    ("had", "stride", "text"),
    [(16, 10, "16"), (10, (10, 16), "10"), ((10, 16), 10, "10,16"), ((16, 10), (10, 16), "16,10"), (5, (12, 3), "5")],
)
def test_another_stride_is_read_at_the_centers_of_the_patches(frames, had, stride, text):
    """The values are the positions in mel bins and frames; bilinear interpolation must reproduce them."""
    source, model = make("ast", frames, had), make("ast", frames, stride)
    columns, rows = source.grid
    mel, time = (torch.arange(float(count)) * step for count, step in zip((rows, columns), source.stride))
    place = torch.stack(
        [*torch.meshgrid(mel, time, indexing="ij"), torch.ones(rows, columns)], -1
    )  # [rows, columns, 3]
    table = torch.cat([torch.full((1, 2, 3), -1.0), place.reshape(1, -1, 3)], dim=1)
    with pytest.warns(UserWarning, match=rf"stride {text}: .* \(--stride {text}\) keeps its positions"):
        fitted, note = fit_positions(table, model, stride=had)
    wanted = [
        (torch.arange(float(count)) * step).clamp(max=end)
        for count, step, end in zip(model.grid[::-1], model.stride, (mel[-1].item(), time[-1].item()))
    ]
    expected = torch.stack([*torch.meshgrid(*wanted, indexing="ij"), torch.ones(model.grid[::-1])], -1)
    torch.testing.assert_close(fitted[0, 2:], expected.flatten(0, 1))
    assert (fitted[:, :2] == -1).all() and "crop" not in note and "time columns" not in note


@pytest.mark.parametrize(
    ("patches", "frames", "asked", "stride"),
    [
        (512, 1024, None, 16),  # the model's size
        (360, 720, None, 16),
        (600, 1200, None, 16),  # although a published checkpoint has this size
        (360, 310, 10, 10),
        (17 * 7, 120, (7, 16), (7, 16)),
        (1212, 1024, 16, 10),  # the size for these frames at one published stride
        (360, 310, None, 10),
        (360, 310, 16, 10),
        (850, 1024, None, 12),
        (1212, 128, None, 10),  # the size of a published checkpoint
        (850, 128, None, 12),
        (657, 128, None, 14),
        (512, 128, 10, 16),
        (600, 128, None, 10),
        (144, 1024, 16, 10),
        (130, 1024, None, 12),  # a grid at one published stride
        (8 * 41, 1024, None, 16),
        (360, 1024, 10, 10),  # a grid at the stride asked for
        (360, 1024, 16, 16),
        (360, 1024, (16, 10), (16, 10)),
    ],
)
def test_the_stride_is_found_by_the_size(patches, frames, asked, stride):
    assert guess_stride(patches, frames, asked) == (stride if isinstance(stride, tuple) else (stride, stride))


@pytest.mark.parametrize("asked", [None, (11, 11)])
def test_an_ambiguous_size_is_rejected_with_the_possible_grids(asked):
    grids = (
        "360 patches are 12 x 30 with a stride of 10, 10 x 36 with a stride of 12, 9 x 40 with a stride of 14 or "
        r"8 x 45 with a stride of 16: pass the stride \(--stride\)"
    )
    with pytest.raises(UserError, match=grids):
        guess_stride(360, 1024, asked)
    if asked is None:
        with pytest.raises(UserError, match=grids):
            fit_positions(numbered("ast", 360), make("ast", 1024), stride=None)
    for stride, rows in ((10, 12), (16, 8)):
        with pytest.warns(UserWarning, match=f"{360 // rows} time columns interpolated"):
            fitted, _ = fit_positions(numbered("ast", 360), make("ast", 1024, stride), stride=stride)
        assert fitted.shape == make("ast", 1024, stride).pos_embed.shape


@pytest.mark.parametrize(("family", "patches"), [("ast", 1213), ("ast", 196), ("audiomae", 1212), ("audiomae", 0)])
def test_other_sizes_are_rejected(family, patches):
    with pytest.raises(UserError, match=f"{patches} patches are not a grid"):
        fit_positions(numbered(family, patches), make(family, 1024), stride=None if family == "ast" else 16)


def test_a_table_of_another_rank_is_rejected():
    with pytest.raises(UserError, match=r"expected \[1, tokens, channels\], the file has \[514, 4\]"):
        fit_positions(torch.zeros(514, 4), make("ast", 1024))
