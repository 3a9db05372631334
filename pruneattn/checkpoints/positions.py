"""Position tables for another number of frames, by each model's own rule."""

import warnings

import torch

from ..constants import PATCH
from ..errors import UserError
from ..models.audiomae import sincos_positions

ROWS = 8  # patches along mel
ROWS_10 = 12  # the same with a stride of 10
STRIDE_10 = (144, 600, 1212)  # patches of the published ASTs with stride 10, for 1, 5 and 10 s


def fit_positions(table, model, *, stride=PATCH):
    """Fit a checkpoint's position table to `model`'s grid.

    - A table of the same length is taken as it is.
    - AST: (8, columns) grid, centre crop in time for fewer columns (as the official AST does).
    - AudioMAE: reshaped to (8, columns), left crop in time, as the paper's code does. The order of the published
      table's tokens is (columns, 8), so this is no crop of the spectrogram, but what the published models are
      fine-tuned with. A table that is our own sine-cosine one is made anew for the model's grid instead.
    - More columns: bilinear interpolation in time, with a warning.

    Args:
        table: ``[1, extra + P', C]``.
        model: AudioMAE or AST, with P patches.
        stride: of the patches that the table is for: 16, or an AST's 10, whose positions are resampled to the
            16-stride patches' centres. None: not known, so 10 for the published sizes and for that of the model's
            frames, unless it is the model's own.

    Returns:
        ``(table, note)``: float32 ``[1, extra + P, C]``, and what was done in words ("" if nothing).

    Raises:
        UserError: the table belongs to no grid that can be fitted.
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
            f"position table: {len(patches)} patches are no grid of 16 x 16 patches over 128 mel bins, which has a "
            f"multiple of {rows} with a stride of {stride}; use a checkpoint with patches and strides of 16"
        )
    grid, note = patches.unflatten(0, (rows, -1)), ""  # [rows, columns', C]
    if stride != PATCH:
        grid, note = _from_stride_10(grid, columns)
    if model.time_major and _is_ours(patches, model):
        fitted = _ours(model, model.num_patches, table.shape[-1])
        note = f"positions: pruneattn's sine-cosine table made for {columns} time columns"
    else:
        grid, change = _fit_columns(grid, columns, centre=not model.time_major)
        fitted, note = grid.flatten(0, 1), "; ".join(filter(None, (note, change)))
    return torch.cat([table[:, :extra], fitted.unsqueeze(0)], dim=1), note


def _fit_columns(grid, columns, centre):
    """Crop or stretch ``[rows, columns', C]`` to ``[rows, columns, C]``."""
    had = grid.shape[1]
    if columns == had:
        return grid, ""
    if columns < had:
        start = had // 2 - columns // 2 if centre else 0
        note = f"positions: {'centre' if centre else 'left'} crop of {had} time columns to {columns}"
        return grid[:, start : start + columns], note
    places = (torch.arange(columns) + 0.5) * (had / columns) - 0.5
    return _interpolate(grid, 1, places), _warn(
        f"positions: {had} time columns interpolated to {columns}; fine-tune before you trust the result"
    )


def _guess_stride(patches, model):
    of_the_model = ROWS_10 * ((model.frames - PATCH) // 10 + 1)
    return 10 if patches != model.num_patches and patches in (of_the_model, *STRIDE_10) else PATCH


def _from_stride_10(grid, columns):
    """The table ``[12, columns', C]`` of stride 10, read at the centres of the 16-stride patches of as many frames.

    Those may be 10 columns' + 6 to 10 columns' + 15: what fits the model's ``columns`` of them, else the most.
    """
    had = grid.shape[1]
    least, most = (10 * had + 6) // PATCH, (10 * had + 15) // PATCH
    columns = columns if least <= columns <= most else most
    grid = _interpolate(grid, 0, torch.arange(ROWS) * 1.6)
    grid = _interpolate(grid, 1, torch.arange(columns) * 1.6)
    return grid, _warn(
        f"positions: an AST of stride 10, its {ROWS_10} x {had} positions resampled to {ROWS} x {columns} of stride 16; "
        "it will lose accuracy until it is fine-tuned"
    )


def _interpolate(grid, dim, places):
    """Linear interpolation of `grid` along `dim` at fractional `places`, the ends continued."""
    last = grid.shape[dim] - 1
    places = places.clamp(0, last)
    low = places.floor().long()
    shape = [-1 if axis == dim else 1 for axis in range(grid.dim())]
    return torch.lerp(
        grid.index_select(dim, low),
        grid.index_select(dim, (low + 1).clamp(max=last)),
        (places - low).view(shape),
    )


def _ours(model, patches, channels):
    return sincos_positions(*model.patch_position(torch.arange(patches)), channels).float()


def _is_ours(patches, model):
    # Half-precision files round to 2^-8 at most; other tables differ by about 1.
    return patches.shape[1] % 4 == 0 and torch.allclose(patches, _ours(model, *patches.shape), rtol=0, atol=1e-2)


def _warn(message):
    warnings.warn(message, stacklevel=5)  # at the caller of load_checkpoint
    return message
