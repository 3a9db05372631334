"""What each pruning stage leaves of a clip (paper, Fig. 1 and 3), and how much of it is sound, pause or padding."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..constants import PATCH
from ..errors import UserError
from ..models.trace import trace
from ..plot import INK, draw_patches, log_mel_colours, mark_pauses, matplotlib_figure
from .command import example_indices, iterate_clips
from .means import Means

#: What a patch holds in most of its frames.
KINDS = ("sound", "pause", "padding")
_PAUSE_DB = 30.0  # below the clip's loud frames (95th percentile)
_PAUSE_FRAMES = 10  # shortest pause, 0.1 s


@dataclass
class Example:
    """A clip to show, all on the CPU."""

    index: int
    fbank: torch.Tensor  # float32 [frames, 128]
    sounding: int  # frames that hold sound
    pauses: torch.Tensor  # bool [frames]
    grids: list  # per pruning stage bool [8, frames // 16]: what is kept, mel row 0 the lowest
    predicted: int  # class number


def find_pauses(fbank, sounding, std):
    """Frames that belong to a pause: at least 0.1 s of sound 30 dB below the clip's loud frames.

    Args:
        fbank: normalised log-mel, float32 ``[B, frames, 128]``.
        sounding: int64 ``[B]``, frames that hold sound; what follows is padding, which is no pause.
        std: of the normalisation ``(x - mean) / (2 * std)``.

    Returns:
        bool ``[B, frames]``.
    """
    # Energy of a frame in dB, but for a constant: log-mel is the natural logarithm of power.
    level = 10 / math.log(10) * (fbank * 2 * std).logsumexp(2)  # [B, frames]
    sounds = torch.arange(fbank.shape[1], device=fbank.device) < sounding.to(fbank.device).unsqueeze(1)
    loud = level.masked_fill(~sounds, torch.nan).nanquantile(0.95, dim=1, keepdim=True)
    quiet = (level < loud - _PAUSE_DB) & sounds
    # A run that is too short vanishes: a frame is in a pause if some window of quiet frames covers it.
    whole = quiet.unfold(1, _PAUSE_FRAMES, 1).all(2).float()  # [B, frames - 9]: a quiet window begins here
    return F.max_pool1d(F.pad(whole, (_PAUSE_FRAMES - 1,) * 2), _PAUSE_FRAMES, stride=1) > 0


def patch_kinds(model, pauses, sounding):
    """Number in ``KINDS`` of each patch in the model's token order, int64 ``[B, P]``: what most of its frames are."""
    frames = torch.arange(pauses.shape[1], device=pauses.device)
    padding = frames >= sounding.to(pauses.device).unsqueeze(1)  # [B, frames]
    in_column = [x.unflatten(1, (-1, PATCH)).float().mean(2) >= 0.5 for x in (pauses, padding)]  # [B, columns] each
    columns = torch.where(in_column[1], 2, in_column[0].long())
    time, _ = model.patch_position(torch.arange(model.num_patches, device=pauses.device))
    return columns[:, time]


def measure_kept(analysis, count, match=()):
    """Shares of sound, pause and padding among the patches left after each stage, and the clips to show.

    Args:
        analysis: `Analysis`; the model prunes at its present keep-rates.
        count: how many clips to show.
        match: texts of which a shown clip's path must contain one.

    Returns:
        ``(rows, examples)``: a dict per stage (``input``, ``after block 4``, ...) and kind with the mean ``share``, its
        standard error ``se`` over ``clips`` and the ``patches`` left of a clip; a list of `Example`.

    Raises:
        UserError: none of the clips to show could be read, or no clip at all.
    """
    model, means, examples = analysis.model, Means(), []
    wanted = example_indices(analysis, count, match)
    for batch in iterate_clips(analysis, "kept patches"):
        with torch.inference_mode():
            found = trace(model, batch.fbank)
        pauses = find_pauses(batch.fbank, batch.sounding, model.features.std)
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
        raise UserError(f"{path}: could not be read, nor any other clip to show; choose others with --match or --clips")
    rows = []
    patches = [model.num_patches, *(kept.shape[1] for kept in found.kept)]
    for stage, (name, left) in enumerate(zip(stage_names(model), patches)):
        for number, kind in enumerate(KINDS):
            share, se, clips = means.of((stage, number))
            rows.append({"stage": name, "patches": left, "kind": kind, "share": share, "se": se, "clips": clips})
    return rows, sorted(examples, key=lambda example: wanted.index(example.index))


def stage_names(model):
    """The input, and each pruning block counted from 1."""
    return ["input", *(f"after block {block + 1}" for block in model.prune_blocks)]


def example_rows(model, dataset, examples):
    """A dict per shown clip and stage: patches left and the share of sound, pause and padding among them."""
    rows = []
    for example in examples:
        kinds = patch_kinds(model, example.pauses[None], torch.tensor([example.sounding]))[0]  # [P]
        everything = torch.ones(model.grid[::-1], dtype=torch.bool)
        time, mel = model.patch_position(torch.arange(model.num_patches))
        for name, grid in zip(stage_names(model), [everything, *example.grids]):
            left = kinds[grid[mel, time]]
            shares = {kind: float((left == number).float().mean()) for number, kind in enumerate(KINDS)}
            rows.append({"clip": str(dataset.clips[example.index].path), "stage": name, "patches": len(left), **shares})
    return rows


def plot_page(model, dataset, examples, title):
    """A row per clip: the spectrogram, then what each stage leaves; padding hatched, pauses marked below."""
    Figure = matplotlib_figure()
    names = stage_names(model)
    wide = model.frames > 256
    width, height = (3.4 if wide else 2.4) * len(names) + 0.6, 1.8 * len(examples) + 0.9
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08)  # room for the bars
    axes = figure.subplots(len(examples), len(names), sharex=True, sharey=True, squeeze=False)
    for line, example in zip(axes, examples):
        clip = dataset.clips[example.index]
        colours = log_mel_colours(example.fbank.numpy(), example.sounding)
        everything = torch.ones(model.grid[::-1], dtype=torch.bool)
        for axis, name, grid in zip(line, names, [everything, *example.grids]):
            draw_patches(axis, colours, grid.numpy(), 0.0, example.sounding)
            mark_pauses(axis, example.pauses.numpy())
            kept = int(grid.sum())
            axis.set_title(f"{name}: {kept} of {grid.numel()}", fontsize=8, loc="left", color=INK, pad=3)
        label = ", ".join(dataset.labels[i] for i in clip.labels)
        said = "" if example.predicted in clip.labels else f" (taken for {dataset.labels[example.predicted]})"
        file = f": {clip.path.stem[:24]}" if wide else ""
        line[0].set_title(f"{label}{said}{file}", fontsize=8, loc="left", color=INK, pad=3)
        line[0].set_ylabel("mel band (Hz)", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("time (s)", fontsize=8)
    figure.suptitle(title, fontsize=11, fontweight="bold", color=INK)
    rule = f"{_PAUSE_DB:g} dB below the loud frames for {_PAUSE_FRAMES / 100:g} s or more"
    figure.supxlabel(f"hatched: padding; orange bar below: pause ({rule})", fontsize=8)
    return figure
