"""Position tables for another grid of patches, by the rule of each model family."""

from __future__ import annotations

import torch

from ..constants import MEL_BINS, PATCH, patch_grid
from ..errors import UserError, warn_caller
from ..models.audiomae import sincos_positions
from ..models.patches import Stride, check_stride, stride_text
from ..models.vit import PrunedViT

#: Strides of published ASTs, equal along mel and time.
PUBLISHED_STRIDES = (10, 12, 14, 16)
#: Frames and stride of published ASTs.
_PUBLISHED = (*((1024, stride) for stride in PUBLISHED_STRIDES), (512, 10), (128, 10))


def fit_positions(table: torch.Tensor, model: PrunedViT, *, stride: Stride | None = PATCH) -> tuple[torch.Tensor, str]:
    """Fit a checkpoint's position table to the grid of a model.

    A table of the model's stride:

    - A table of the same length stays as it is.
    - AST: the table is a (rows, columns) grid; fewer columns are the center crop in time, as in the official AST.
    - AudioMAE: the table is reshaped to (8, columns); fewer columns are the left crop in time, as in the paper's code.
      The tokens of the published table are in (columns, 8) order, so this does not crop the spectrogram, but the
      published models are fine-tuned with it. A sine-cosine table of this package is recomputed for the grid of the
      model instead.
    - More columns are interpolated bilinearly in time, with a warning.

    A table of another stride (AST) is resampled at the centers of the model's patches, with a warning. Its columns are
    then fitted as above.

    Args:
        table: ``[1, extra + P', C]``.
        model: AudioMAE or AST with P patches.
        stride: stride of the table: one number, or ``(frequency, time)``. None: unknown; then :func:`guess_stride`
            finds it by the size of the table. A model with another stride than 16 asks for its stride.

    Returns:
        ``(table, note)``: float32 ``[1, extra + P, C]``, and a description of the changes ("" if there are none).

    Raises:
        UserError: the table is not a grid that can be fitted, or its stride is unknown.
    """
    extra, columns = model.num_extra_tokens, model.grid[0]
    if table.dim() != 3 or table.shape[0] != 1:
        raise UserError(f"position table: expected [1, tokens, channels], the file has {list(table.shape)}")
    table = table.float()
    patches = table[0, extra:]  # [P', C]
    if stride is None:
        asked = None if model.stride == (PATCH, PATCH) else model.stride
        stride = guess_stride(len(patches), model.frames, asked)
    stride = check_stride(stride)
    if stride == model.stride and len(patches) == model.num_patches:
        return table, ""
    rows = _rows(stride)
    if not len(patches) or len(patches) % rows:
        raise _not_a_grid(len(patches), stride)
    grid, note = patches.unflatten(0, (rows, -1)), ""  # [rows, columns', C]
    if stride != model.stride:
        grid, note = _resample(grid, stride, model)
    if model.time_major and _is_ours(patches, model):
        fitted = _ours(model, model.num_patches, table.shape[-1])
        note = f"positions: pruneattn's sine-cosine table made for {columns} time columns"
    else:
        grid, change = _fit_columns(grid, columns, center=not model.time_major)
        fitted, note = grid.flatten(0, 1), "; ".join(filter(None, (note, change)))
    return torch.cat([table[:, :extra], fitted.unsqueeze(0)], dim=1), note


def guess_stride(patches: int, frames: int, asked: Stride | None = None) -> tuple[int, int]:
    """Find the stride of an AST's position table by its size. The first rule that applies decides:

    1. The table has the size for these frames at the stride asked for (16 if none is): it has this stride.
    2. It has the size for these frames at exactly one published stride: it has that stride.
    3. It has the size of a published checkpoint: it has the stride of this checkpoint.
    4. It is a grid at exactly one published stride: it has that stride.
    5. It is a grid at the stride asked for: it has this stride.

    Args:
        patches: number of patches of the table.
        frames: frames of the model that gets the table.
        asked: stride of this model; None if nobody asked for one.

    Returns:
        The stride ``(frequency, time)``.

    Raises:
        UserError: no rule applies. The message lists the possible grids.
    """
    wanted = (PATCH, PATCH) if asked is None else check_stride(asked)
    published = [(step, step) for step in PUBLISHED_STRIDES]
    sizes = {stride: _size(frames, stride) for stride in published}
    if patches == _size(frames, wanted):
        return wanted
    fitting = [stride for stride in published if sizes[stride] == patches]
    if len(fitting) == 1:
        return fitting[0]
    for length, step in _PUBLISHED:
        if patches == _size(length, (step, step)):
            return step, step
    grids = [stride for stride in published if patches and patches % _rows(stride) == 0]
    if len(grids) == 1:
        return grids[0]
    if asked is not None and patches and patches % _rows(wanted) == 0:
        return wanted
    if not grids:
        raise _not_a_grid(patches, wanted)
    listed = [f"{_rows(one)} x {patches // _rows(one)} with a stride of {stride_text(one)}" for one in grids]
    raise UserError(
        f"position table: {patches} patches are {', '.join(listed[:-1])} or {listed[-1]}: pass the stride (--stride)"
    )


def _rows(stride: tuple[int, int]) -> int:
    """Patches along mel."""
    return patch_grid(PATCH, stride)[1]


def _size(frames: int, stride: tuple[int, int]) -> int:
    columns, rows = patch_grid(frames, stride)
    return columns * rows


def _not_a_grid(patches: int, stride: tuple[int, int]) -> UserError:
    return UserError(
        f"position table: {patches} patches are not a grid of {PATCH} x {PATCH} patches over {MEL_BINS} mel bins, "
        f"which has a multiple of {_rows(stride)} with a stride of {stride_text(stride)}; use a checkpoint with such "
        "patches, or pass its stride (--stride)"
    )


def _fit_columns(grid: torch.Tensor, columns: int, center: bool) -> tuple[torch.Tensor, str]:
    """Crop or stretch ``[rows, columns', C]`` to ``[rows, columns, C]``."""
    had = grid.shape[1]
    if columns == had:
        return grid, ""
    if columns < had:
        start = had // 2 - columns // 2 if center else 0
        note = f"positions: {'center' if center else 'left'} crop of {had} time columns to {columns}"
        return grid[:, start : start + columns], note
    places = (torch.arange(columns) + 0.5) * (had / columns) - 0.5
    return _interpolate(grid, 1, places), _warn(
        f"positions: {had} time columns interpolated to {columns}; fine-tune the model before you use it"
    )


def _resample(grid: torch.Tensor, stride: tuple[int, int], model: PrunedViT) -> tuple[torch.Tensor, str]:
    """Resample a grid ``[rows', columns', C]`` of another stride at the centers of the model's patches.

    A grid of n columns with a stride of s belongs to clips of s (n - 1) + 16 frames or up to s - 1 more. The result
    has the model's columns if a clip of that length can have them, else the largest number that it can have.
    """
    had_rows, had = grid.shape[:2]
    (of_mel, of_time), (mel, time) = stride, model.stride
    frames = of_time * (had - 1) + PATCH  # at least
    least, most = (patch_grid(length, model.stride)[0] for length in (frames, frames + of_time - 1))
    columns, rows = model.grid
    columns = columns if least <= columns <= most else most
    grid = _interpolate(grid, 0, torch.arange(rows) * (mel / of_mel))
    grid = _interpolate(grid, 1, torch.arange(columns) * (time / of_time))
    own, text = stride_text(stride), stride_text(model.stride)
    return grid, _warn(
        f"positions: an AST with stride {own}: its {had_rows} x {had} positions resampled to {rows} x {columns} of "
        f"stride {text}; the model loses accuracy until it is fine-tuned; a model with the stride of the checkpoint "
        f"(--stride {own}) keeps its positions"
    )


def _interpolate(grid: torch.Tensor, dim: int, places: torch.Tensor) -> torch.Tensor:
    """Interpolate `grid` linearly along `dim` at fractional `places`; places outside take the nearest end."""
    last = grid.shape[dim] - 1
    places = places.clamp(0, last)
    low = places.floor().long()
    shape = [-1 if axis == dim else 1 for axis in range(grid.dim())]
    return torch.lerp(
        grid.index_select(dim, low),
        grid.index_select(dim, (low + 1).clamp(max=last)),
        (places - low).view(shape),
    )


def _ours(model: PrunedViT, patches: int, channels: int) -> torch.Tensor:
    column, row = model.patch_position(torch.arange(patches))
    return sincos_positions(column, row, channels).float()


def _is_ours(patches: torch.Tensor, model: PrunedViT) -> bool:
    # Half precision rounds by at most 2^-8; other tables differ by about 1.
    return patches.shape[1] % 4 == 0 and torch.allclose(patches, _ours(model, *patches.shape), rtol=0, atol=1e-2)


def _warn(message: str) -> str:
    warn_caller(message)
    return message
