"""Position tables for another number of frames, by the rule of each model family."""

from __future__ import annotations

import warnings

import torch

from ..constants import MEL_BINS, PATCH
from ..errors import UserError
from ..models.audiomae import sincos_positions
from ..models.vit import PrunedViT

ROWS = MEL_BINS // PATCH  # patches along mel
STRIDE_10 = 10  # of the published ASTs
ROWS_10 = (MEL_BINS - PATCH) // STRIDE_10 + 1  # patches along mel with a stride of 10
PATCHES_10 = (144, 600, 1212)  # of the published ASTs with a stride of 10, for clips of 1, 5 and 10 s


def fit_positions(table: torch.Tensor, model: PrunedViT, *, stride: int | None = PATCH) -> tuple[torch.Tensor, str]:
    """Fit a checkpoint's position table to the grid of a model.

    - A table of the same length stays as it is.
    - AST: the table is an (8, columns) grid; fewer columns are the center crop in time, as in the official AST.
    - AudioMAE: the table is reshaped to (8, columns); fewer columns are the left crop in time, as in the paper's code.
      The tokens of the published table are in (columns, 8) order, so this does not crop the spectrogram, but the
      published models are fine-tuned with it. A sine-cosine table of this package is recomputed for the grid of the
      model instead.
    - More columns are interpolated bilinearly in time, with a warning.

    Args:
        table: ``[1, extra + P', C]``.
        model: AudioMAE or AST with P patches.
        stride: stride of the patches of the table: 16, or 10 for an AST. Positions of stride 10 are resampled at the
            centers of patches of stride 16. None: unknown; then it is 10 if the table has one of the published sizes
            or the size for the model's frames, unless that is also the model's own size.

    Returns:
        ``(table, note)``: float32 ``[1, extra + P, C]``, and a description of the changes ("" if there are none).

    Raises:
        UserError: the table is not a grid that can be fitted.
    """
    extra, columns = model.num_extra_tokens, model.grid[0]
    if table.dim() != 3 or table.shape[0] != 1:
        raise UserError(f"position table: expected [1, tokens, channels], the file has {list(table.shape)}")
    table = table.float()
    patches = table[0, extra:]  # [P', C]
    stride = _guess_stride(len(patches), model) if stride is None else stride
    if stride == PATCH and len(patches) == model.num_patches:
        return table, ""
    rows = ROWS if stride == PATCH else ROWS_10
    if not len(patches) or len(patches) % rows:
        raise UserError(
            f"position table: {len(patches)} patches are not a grid of {PATCH} x {PATCH} patches over {MEL_BINS} mel "
            f"bins, which has a multiple of {rows} with a stride of {stride}; use a checkpoint with a stride of {PATCH}"
        )
    grid, note = patches.unflatten(0, (rows, -1)), ""  # [rows, columns', C]
    if stride != PATCH:
        grid, note = _from_stride_10(grid, columns)
    if model.time_major and _is_ours(patches, model):
        fitted = _ours(model, model.num_patches, table.shape[-1])
        note = f"positions: pruneattn's sine-cosine table made for {columns} time columns"
    else:
        grid, change = _fit_columns(grid, columns, center=not model.time_major)
        fitted, note = grid.flatten(0, 1), "; ".join(filter(None, (note, change)))
    return torch.cat([table[:, :extra], fitted.unsqueeze(0)], dim=1), note


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


def _guess_stride(patches: int, model: PrunedViT) -> int:
    of_the_model = ROWS_10 * ((model.frames - PATCH) // STRIDE_10 + 1)
    return STRIDE_10 if patches != model.num_patches and patches in (of_the_model, *PATCHES_10) else PATCH


def _from_stride_10(grid: torch.Tensor, columns: int) -> tuple[torch.Tensor, str]:
    """Resample a grid ``[12, columns', C]`` of stride 10 at the centers of patches of stride 16.

    With n columns, the clip had 10 n + 6 to 10 n + 15 frames. The result has the model's ``columns`` if a clip of that
    length can have as many columns of stride 16, else the largest number that it can have.
    """
    had = grid.shape[1]
    frames = STRIDE_10 * (had - 1) + PATCH  # at least; one more column begins STRIDE_10 later
    least, most = frames // PATCH, (frames + STRIDE_10 - 1) // PATCH
    columns = columns if least <= columns <= most else most
    grid = _interpolate(grid, 0, torch.arange(ROWS) * (PATCH / STRIDE_10))
    grid = _interpolate(grid, 1, torch.arange(columns) * (PATCH / STRIDE_10))
    return grid, _warn(
        f"positions: an AST with stride {STRIDE_10}: its {ROWS_10} x {had} positions resampled to {ROWS} x {columns} "
        f"of stride {PATCH}; the model loses accuracy until it is fine-tuned"
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
    warnings.warn(message, stacklevel=5)  # attributed to the caller of load_checkpoint
    return message
