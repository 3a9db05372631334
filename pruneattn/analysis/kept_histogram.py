"""Mean and standard deviation of the patches before and after pruning, for one or two models (paper, Fig. 6)."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from ..checkpoints.opening import open_checkpoint
from ..data import FeatureConfig
from ..data.fbank import LOG_FLOOR
from ..errors import UserError
from ..models.patches import Stride, stride_text
from ..models.trace import trace
from ..models.vit import PrunedViT
from ..plot import INK, matplotlib_figure
from ..report import Row
from .clips import Analysis, features_of, iterate_clips
from .clusters import STATISTICS, Clusters
from .kept_patches import stage_names
from .means import Means

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Edges of the bins of mean and of standard deviation.
Edges = tuple[NDArray[np.float64], NDArray[np.float64]]

# Range of a patch before normalization, from Kaldi's floor to above the level of full-scale sound. Values outside count
# in the outermost bins.
_MEAN_EDGES = np.linspace(LOG_FLOOR, 10, 91)
_DEVIATION_EDGES = np.linspace(0, 12, 81)
_LOW = 2  # C1 and C2


def bin_edges(features: FeatureConfig) -> Edges:
    """Edges of the bins of mean and of standard deviation, in units of the normalized log-mel."""
    return (_MEAN_EDGES - features.mean) / (2 * features.std), _DEVIATION_EDGES / (2 * features.std)


def open_second(
    analysis: Analysis,
    checkpoint: str | os.PathLike[str],
    model: str | None = None,
    score: str | None = None,
    stride: Stride | None = None,
) -> PrunedViT:
    """Open another checkpoint to compare with ``analysis.model`` on the same clips, on the same device.

    Args:
        analysis: first model, and dataset.
        checkpoint: path or Hub name of the second checkpoint.
        model: name of its model if it is of another project (AST, AudioMAE, Hugging Face, timm). Such a checkpoint does
            not contain its features, and gets those of the first model.
        score: ranks its patches; None: its own.
        stride: stride of its patches: one number, or ``(frequency, time)``. None: its own.

    Raises:
        UserError: the models have different input (frames, normalization or padding) or different strides.
    """
    path, features, dataset = os.fspath(checkpoint), features_of(analysis.model), analysis.dataset.name
    if model is None:
        second = open_checkpoint(path, dataset=dataset, score=score, stride=stride)
    else:
        second = open_checkpoint(
            path,
            model=model,
            dataset=dataset,
            num_classes=analysis.model.num_classes,
            frames=features.frames,
            mean=features.mean,
            std=features.std,
            padding=features.padding,
            score=score,
            stride=stride,
        )
    ours, theirs = features.to_dict(), features_of(second).to_dict()
    different = [f"{name} {ours[name]} and {theirs[name]}" for name in ours if ours[name] != theirs[name]]
    if different:
        raise UserError(
            f"--against {checkpoint}: the two checkpoints have different input ({', '.join(different)}): use models "
            "that were trained on the same features"
        )
    if second.stride != analysis.model.stride:
        strides = f"{stride_text(analysis.model.stride)} and {stride_text(second.stride)}"
        raise UserError(
            f"--against {checkpoint}: the patches of the two checkpoints have different strides ({strides}), so their "
            "numbers cannot be compared: use models with the same stride, or choose it with --stride"
        )
    return second.to(analysis.device)


def measure_histograms(
    analysis: Analysis, models: Sequence[PrunedViT], clusters: Clusters
) -> tuple[NDArray[np.int64], list[Row], Row | None]:
    """Compute histograms and cluster shares of the patches that each model keeps, in one pass over the clips.

    Args:
        analysis: dataset.
        models: one or two models with the same input, at the keep-rates to compare.
        clusters: clusters by intensity.

    Returns:
        ``(histograms, rows, ratio)``. ``histograms`` are counts int64 ``[1 + models, 90, 80]`` in the bins of
        ``bin_edges``: patches of the input, then patches that each model's last stage keeps. ``rows`` has a dict per
        model, stage and cluster with the mean ``share`` of the ``patches`` of a clip, its standard error ``se`` and the
        number of ``clips``. ``ratio``, for two models, compares the C1 and C2 patches that each keeps of a clip: their
        means, the ``ratio`` and its standard error ``se``.
    """
    edges = bin_edges(features_of(models[0]))
    bins = [len(edge) - 1 for edge in edges]
    histograms = np.zeros((1 + len(models), *bins), dtype=np.int64)
    means, pairs = Means(), []
    counts: dict[tuple[int, int], int] = {}  # patches of a clip by model and stage
    for batch in iterate_clips(analysis, "histograms"):
        low = []
        for number, model in enumerate(models):
            values = [model.patch_values(batch.fbank, statistic) for statistic in STATISTICS.values()]  # [B, P] each
            cluster = clusters.assign(clusters.values(model, batch.fbank))
            if number == 0:
                histograms[0] += _histogram(values, edges)
            with torch.inference_mode():
                kept = trace(model, batch.fbank).kept
            everything = torch.arange(model.num_patches, device=analysis.device).expand_as(cluster)
            for stage, index in enumerate([everything, *kept]):
                left = cluster.gather(1, index)  # [B, k]
                counts[number, stage] = left.shape[1]
                for i in range(len(clusters.centres)):
                    means.add((left == i).float().mean(1), (number, stage, i))
            histograms[1 + number] += _histogram([value.gather(1, index) for value in values], edges)
            low.append((left < _LOW).sum(1).double().cpu())
        pairs.append(torch.stack(low, 1))  # [B, models]
    rows = []
    for number, model in enumerate(models):
        for stage, name in enumerate(stage_names(model)):
            for i in range(len(clusters.centres)):
                share, se, clips = means.of((number, stage, i))
                rows.append(
                    {
                        "number": number + 1,
                        "model": model.name,
                        "stage": name,
                        "patches": counts[number, stage],
                        "cluster": f"C{i + 1}",
                        "share": share,
                        "se": se,
                        "clips": clips,
                    }
                )
    return histograms, rows, _ratio_row(models, torch.cat(pairs)) if len(models) == 2 else None


def _ratio_row(models: Sequence[PrunedViT], pairs: torch.Tensor) -> Row:
    ratio, se = ratio_of_means(pairs)
    first, second = pairs.mean(0).tolist()
    return {
        "clusters": "C1 + C2",
        "first": models[0].name,
        "kept_by_first": first,
        "second": models[1].name,
        "kept_by_second": second,
        "ratio": ratio,
        "se": se,
        "clips": len(pairs),
    }


def _histogram(values: Sequence[torch.Tensor], edges: Edges) -> NDArray[np.int64]:
    x, y = (np.clip(value.cpu().numpy().ravel(), edge[0], edge[-1]) for value, edge in zip(values, edges, strict=True))
    return np.histogram2d(x, y, list(edges))[0].astype(np.int64)


def ratio_of_means(pairs: torch.Tensor) -> tuple[float, float]:
    """Ratio of the means of two columns ``[N, 2]`` of paired counts, and its standard error by the delta method.

    The sample consists of clips, not of patches: a clip that is quiet for one model is quiet for the other, and the
    pairs preserve this.

    Returns:
        ``(ratio, standard error)``. If the second column is 0, the ratio is infinite or NaN, and the error is NaN. For
        one clip the error is NaN.
    """
    first, second = pairs.double().unbind(1)
    if second.sum() == 0:
        return math.inf if first.sum() > 0 else math.nan, math.nan
    ratio = first.mean() / second.mean()
    if len(pairs) == 1:
        return float(ratio), math.nan
    variance = (first - ratio * second).square().sum() / (len(pairs) - 1)
    return float(ratio), float((variance / len(pairs)) ** 0.5 / second.mean())


def plot_histograms(
    histograms: NDArray[np.int64],
    rows: Sequence[Row],
    clusters: Clusters,
    edges: Edges,
    names: Sequence[str],
    title: str,
) -> Figure:
    """Draw the patches of the input and those that each model keeps: mean on x, standard deviation on y, log colors.

    Args:
        histograms: histograms of ``measure_histograms``.
        rows: rows of ``measure_histograms``.
        clusters: clusters by intensity, whose boundaries are drawn.
        edges: edges of ``bin_edges``.
        names: title of each model's panel.
        title: title of the figure.

    Returns:
        matplotlib ``Figure``.
    """
    from matplotlib.colors import LogNorm

    Figure = matplotlib_figure()
    count = len(histograms)
    figure = Figure(figsize=(3.6 * count + 0.9, 3.9), dpi=150, layout="constrained")
    axes = figure.subplots(1, count, sharex=True, sharey=True, squeeze=False)[0]
    shares = histograms / histograms.sum((1, 2), keepdims=True)
    norm = LogNorm(shares[shares > 0].min(), shares.max())
    used = shares.sum(0) > 0  # [mean bins, deviation bins]
    x, y = edges
    left, right, top = x[:-1][used.any(1)][0], x[1:][used.any(1)][-1], 1.18 * y[1:][used.any(0)][-1]
    columns = (min(left, clusters.boundaries[0]), *clusters.boundaries, max(right, clusters.boundaries[-1]))
    for number, (axis, share, name) in enumerate(zip(axes, shares, ["input", *names], strict=True)):
        visible = np.where(share > 0, share, np.nan)
        mesh = axis.pcolormesh(x, y, visible.T, norm=norm)
        for boundary in clusters.boundaries:
            axis.axvline(boundary, color=INK, lw=0.7, ls=":")
        of = [row for row in rows if row["number"] == max(1, number)]
        stage = of[0 if number == 0 else -1]["stage"]
        of = [row for row in of if row["stage"] == stage]
        for row, (begin, end) in zip(of, pairwise(columns), strict=True):
            axis.annotate(
                f"{row['cluster']}\n{row['share']:.0%}",
                ((begin + end) / 2, 0.98),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="top",
                fontsize=7.5,
                color=INK,
            )
        axis.set_title(name, fontsize=9, loc="left", color=INK)
        axis.set_xlabel("mean of a patch (intensity)")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_xlim(columns[0], columns[-1])
    axes[0].set_ylim(0, top)
    axes[0].set_ylabel("standard deviation (variation)")
    figure.colorbar(mesh, ax=list(axes), label="share of the patches", pad=0.01)
    figure.suptitle(title, fontsize=10.5, fontweight="bold", color=INK)
    return figure
