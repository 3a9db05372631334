"""Plots of clips: the spectrogram, and the patches of it that pruning keeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..constants import HOP, SAMPLE_RATE, WINDOW
from ..data import FeatureExtractor
from ..data.fbank import samples_for
from ..models import PrunedViT
from ..models.trace import trace
from ..plot import plot_kept_patches
from ..runtime.inference import autocast
from .windows import Clip

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@torch.inference_mode()
def draw_clip(model: PrunedViT, clip: Clip, device: torch.device | str, amp: str = "fp32") -> Figure:
    """Plot the window with the highest score of the clip's label, and the patches that each pruning block keeps.

    Args:
        model: opened checkpoint on ``device``, with ``features`` and ``labels``.
        clip: labeled ``windows.Clip``.
        amp: "fp32", "bf16" or "fp16".
    """
    assert model.labels is not None  # of an opened checkpoint
    top = int(clip.mean_scores.argmax())
    best = max(range(len(clip.starts)), key=lambda i: float(clip.scores[i][top]))
    start = clip.starts[best]
    wave = clip.part(start, samples_for(model.frames))
    fbank = FeatureExtractor(model.features).to(device)(wave[None].to(device))  # [1, frames, 128]
    with autocast(device, amp):
        kept = trace(model, fbank).kept
    stages, counts = [], [model.num_patches]
    for block, index in zip(model.prune_blocks, kept):
        stages.append((f"after block {block + 1}", model.kept_grid(index[0].cpu()).numpy()))
        counts.append(index.shape[1])
    rates = model.keep_rates
    if all(count == counts[0] for count in counts):
        stages, pruning = [], "keep-rate 1: no patch is pruned (--keep-rate sets another)"
    else:
        rate = f"{rates[0]:g}" if len(set(rates)) == 1 else ", ".join(f"{rate:g}" for rate in rates)
        pruning = f"keep-rate {rate}, patches {' → '.join(map(str, counts))}"
    part = ""
    if len(clip.starts) > 1:
        begin, end, whole = (samples / SAMPLE_RATE for samples in (start, start + len(wave), clip.samples))
        part = f", seconds {begin:.1f} to {end:.1f} of {whole:.1f}"
    return plot_kept_patches(
        fbank[0].float().cpu().numpy(),
        stages,
        title=f"{Path(clip.path).name}: {model.labels[top]} ({float(clip.mean_scores[top]):.2f})",
        subtitle=f"{model.name}, {pruning}{part}",
        sounding=1 + (len(wave) - WINDOW) // HOP,
        start=start / SAMPLE_RATE,
        stride=model.stride,
    )


def picture_names(path: Path, clips: Sequence[str]) -> dict[str, Path]:
    """File of each clip's plot: ``path``, or ``PATH-CLIP.png`` for several clips, with a number where names repeat."""
    if len(clips) == 1:
        return {clips[0]: path}
    names: dict[str, Path] = {}
    taken: set[Path] = set()
    for clip in clips:
        stem = f"{path.stem}-{Path(clip).stem}"
        name, number = path.with_stem(stem), 2
        while name in taken:
            name, number = path.with_stem(f"{stem}-{number}"), number + 1
        taken.add(name)
        names[clip] = name
    return names
