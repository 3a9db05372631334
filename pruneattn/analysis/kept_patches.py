"""Patches of a clip that each pruning stage keeps (paper, Fig. 1 and 3), and the share of sound, pause and padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ..constants import HOP, PATCH, SAMPLE_RATE
from ..data.clips import ClipDataset
from ..errors import UserError
from ..models.trace import trace
from ..models.vit import PrunedViT
from ..plot import INK, coverage_note, draw_patches, log_mel_colors, mark_pauses, matplotlib_figure
from ..report import Row
from .clips import Analysis, example_indices, features_of, iterate_clips
from .means import Means

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Content of most of a patch's frames.
KINDS = ("sound", "pause", "padding")
_PAUSE_DB = 30.0  # below the clip's loud frames (95th percentile)
_PAUSE_FRAMES = 10  # shortest pause, 0.1 s


@dataclass
class Example:
    """A clip to show, with all tensors on the CPU."""

    index: int
    fbank: torch.Tensor  # float32 [frames, 128]
    sounding: int  # number of frames that contain sound
    pauses: torch.Tensor  # bool [frames]
    grids: list[torch.Tensor]  # per pruning stage bool [mel rows, time columns]: the kept patches, row 0 the lowest
    predicted: int  # class number


def find_pauses(fbank: torch.Tensor, sounding: torch.Tensor, std: float) -> torch.Tensor:
    """Find the frames in pauses: at least 0.1 s of sound that is 30 dB below the clip's loud frames.

    Args:
        fbank: normalized log-mel, float32 ``[B, frames, 128]``.
        sounding: int64 ``[B]``, number of frames that contain sound. The padding after them is no pause.
        std: standard deviation in the normalization ``(x - mean) / (2 * std)``.

    Returns:
        bool ``[B, frames]``.
    """
    # Energy of a frame in dB, up to a constant: log-mel is the natural logarithm of power.
    level = 10 / math.log(10) * (fbank * 2 * std).logsumexp(2)  # [B, frames]
    sounds = torch.arange(fbank.shape[1], device=fbank.device) < sounding.to(fbank.device).unsqueeze(1)
    loud = level.masked_fill(~sounds, torch.nan).nanquantile(0.95, dim=1, keepdim=True)
    quiet = (level < loud - _PAUSE_DB) & sounds
    # Runs that are too short vanish: a frame is in a pause if some window of quiet frames covers it.
    whole = quiet.unfold(1, _PAUSE_FRAMES, 1).all(2).float()  # [B, frames - 9]: a quiet window begins here
    return F.max_pool1d(F.pad(whole, (_PAUSE_FRAMES - 1,) * 2), _PAUSE_FRAMES, stride=1) > 0


def patch_kinds(model: PrunedViT, pauses: torch.Tensor, sounding: torch.Tensor) -> torch.Tensor:
    """Number in ``KINDS`` of the content of most of each patch's frames.

    A frame that several patches cover counts in each of them.

    Args:
        model: model of the token order and the stride.
        pauses: bool ``[B, frames]``.
        sounding: int64 ``[B]``, number of frames that contain sound.

    Returns:
        int64 ``[B, P]`` in the model's token order.
    """
    frames = torch.arange(pauses.shape[1], device=pauses.device)
    padding = frames >= sounding.to(pauses.device).unsqueeze(1)  # [B, frames]
    step = model.stride[1]
    in_column = [x.unfold(1, PATCH, step).float().mean(2) >= 0.5 for x in (pauses, padding)]  # [B, columns] each
    columns = torch.where(in_column[1], 2, in_column[0].long())
    time, _ = model.patch_position(torch.arange(model.num_patches, device=pauses.device))
    return columns[:, time]


def measure_kept(analysis: Analysis, count: int, match: Sequence[str] = ()) -> tuple[list[Row], list[Example]]:
    """Compute the shares of sound, pause and padding among the patches after each stage, and collect clips to show.

    Args:
        analysis: model, which prunes at its current keep-rates, and dataset.
        count: number of clips to show.
        match: show only clips whose path contains one of these texts; empty: any clips.

    Returns:
        ``(rows, examples)``. ``rows`` has a dict per stage (``input``, ``after block 4``, ...) and kind with the mean
        ``share``, its standard error ``se`` over ``clips`` and the number of ``patches`` of a clip.

    Raises:
        UserError: none of the clips to show can be read, or no clip at all.
    """
    model, means = analysis.model, Means()
    std = features_of(model).std
    examples: list[Example] = []
    wanted = example_indices(analysis, count, match)
    for batch in iterate_clips(analysis, "kept patches"):
        with torch.inference_mode():
            found = trace(model, batch.fbank)
        pauses = find_pauses(batch.fbank, batch.sounding, std)
        kinds = patch_kinds(model, pauses, batch.sounding)  # [B, P]
        for stage, kept in enumerate([None, *found.kept]):
            left = kinds if kept is None else kinds.gather(1, kept)
            for kind in range(len(KINDS)):
                means.add((left == kind).float().mean(1), (stage, kind))
        for row, index in enumerate(batch.index.tolist()):
            if index in wanted:
                grids = [model.kept_grid(kept[row].cpu()) for kept in found.kept]
                predicted, sounding = int(found.logits[row].argmax()), int(batch.sounding[row])
                examples.append(Example(index, batch.fbank[row].cpu(), sounding, pauses[row].cpu(), grids, predicted))
    if not examples:
        path = analysis.dataset.clips[wanted[0]].path
        raise UserError(
            f"{path} and the other clips to show could not be read: choose other clips with --match or --clips"
        )
    rows = []
    patches = [model.num_patches, *(kept.shape[1] for kept in found.kept)]
    for stage, (name, kept_of_a_clip) in enumerate(zip(stage_names(model), patches, strict=True)):
        for number, kind_name in enumerate(KINDS):
            share, se, clips = means.of((stage, number))
            rows.append(
                {"stage": name, "patches": kept_of_a_clip, "kind": kind_name, "share": share, "se": se, "clips": clips}
            )
    return rows, sorted(examples, key=lambda example: wanted.index(example.index))


def stage_names(model: PrunedViT) -> list[str]:
    """Names of the stages: the input, and each pruning block, counted from 1."""
    return ["input", *(f"after block {block + 1}" for block in model.prune_blocks)]


def example_rows(model: PrunedViT, dataset: ClipDataset, examples: Sequence[Example]) -> list[Row]:
    """A dict per shown clip and stage: number of patches, and the share of sound, pause and padding among them."""
    rows = []
    for example in examples:
        kinds = patch_kinds(model, example.pauses[None], torch.tensor([example.sounding]))[0]  # [P]
        everything = torch.ones(model.grid[::-1], dtype=torch.bool)
        time, mel = model.patch_position(torch.arange(model.num_patches))
        for name, grid in zip(stage_names(model), [everything, *example.grids], strict=True):
            left = kinds[grid[mel, time]]
            shares = {kind: float((left == number).float().mean()) for number, kind in enumerate(KINDS)}
            rows.append({"clip": str(dataset.clips[example.index].path), "stage": name, "patches": len(left), **shares})
    return rows


def plot_page(model: PrunedViT, dataset: ClipDataset, examples: Sequence[Example], title: str) -> Figure:
    """Draw a row for each clip: the spectrogram, then the patches after each stage.

    Padding is hatched, and bars below the spectrograms mark the pauses.

    Args:
        model: model that pruned the examples.
        dataset: dataset of the examples, for their names.
        examples: clips to show.
        title: title of the page.

    Returns:
        matplotlib ``Figure``.
    """
    Figure = matplotlib_figure()
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    names = stage_names(model)
    wide = model.frames > 256
    width, height = (3.4 if wide else 2.4) * len(names) + 0.6, 1.8 * len(examples) + 0.9
    layout = ConstrainedLayoutEngine(h_pad=0.08)  # room for the bars
    figure = Figure(figsize=(width, height), dpi=150, layout=layout)
    axes = figure.subplots(len(examples), len(names), sharex=True, sharey=True, squeeze=False)
    for line, example in zip(axes, examples, strict=True):
        clip = dataset.clips[example.index]
        colors = log_mel_colors(example.fbank.numpy(), example.sounding)
        everything = torch.ones(model.grid[::-1], dtype=torch.bool)
        for axis, name, grid in zip(line, names, [everything, *example.grids], strict=True):
            draw_patches(axis, colors, grid.numpy(), 0.0, example.sounding, model.stride)
            mark_pauses(axis, example.pauses.numpy())
            kept = int(grid.sum())
            axis.set_title(f"{name}: {kept} of {grid.numel()}", fontsize=8, loc="left", color=INK, pad=3)
        label = ", ".join(dataset.labels[i] for i in clip.labels)
        wrong = "" if example.predicted in clip.labels else f" (predicted: {dataset.labels[example.predicted]})"
        file = f": {clip.path.stem[:24]}" if wide else ""
        line[0].set_title(f"{label}{wrong}{file}", fontsize=8, loc="left", color=INK, pad=3)
        line[0].set_ylabel("mel band (Hz)", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("time (s)", fontsize=8)
    figure.suptitle(title, fontsize=11, fontweight="bold", color=INK)
    shortest = _PAUSE_FRAMES * HOP / SAMPLE_RATE
    rule = f"at least {shortest:g} s that is {_PAUSE_DB:g} dB below the loud frames"
    notes = ["hatched: padding", f"orange bar below: pause ({rule})", coverage_note(model.frames, model.stride)]
    figure.supxlabel("; ".join(filter(None, notes)), fontsize=8)
    return figure
