"""Mean and deviation of the patches before and after pruning, model against model (paper, Fig. 6)."""

import copy
import math

import numpy as np
import torch

from ..errors import UserError
from ..models.trace import trace
from ..opening import open_checkpoint
from ..plot import INK, matplotlib_figure
from .clusters import STATISTICS
from .command import iterate_clips
from .kept_patches import stage_names
from .means import Means

# Bins of the normalised log-mel; what lies outside counts in the outermost. Kaldi's floor is near -1.3 on AudioSet.
_MEAN_EDGES = np.linspace(-1.5, 1.5, 91)
_DEVIATION_EDGES = np.linspace(0, 0.9, 61)
_LOW = 2  # C1 and C2


def open_second(analysis, checkpoint):
    """Another checkpoint to hold against ``analysis.model`` on the same clips, on the same device.

    Raises:
        UserError: it reads another input (frames, normalisation or padding).
    """
    args = copy.copy(analysis.args)
    args.checkpoint = checkpoint
    model = open_checkpoint(args, args.dataset).to(analysis.device)
    ours, theirs = analysis.model.features.to_dict(), model.features.to_dict()
    different = [f"{name} {ours[name]} and {theirs[name]}" for name in ours if ours[name] != theirs[name]]
    if different:
        raise UserError(
            f"--against {checkpoint}: the two checkpoints read different input ({', '.join(different)}); "
            "compare models that were trained on the same features"
        )
    return model


def measure_histograms(analysis, models, clusters):
    """Histograms and cluster shares of the patches that each model leaves, in one pass over the clips.

    Args:
        analysis: `Analysis`, whose clips are used.
        models: one or two ``PrunedViT`` with the same input, at the keep-rates wanted.
        clusters: `Clusters` by intensity.

    Returns:
        ``(histograms, rows, ratio)``: counts int64 ``[1 + models, mean bins, deviation bins]`` of the input and of
        what each model's last stage leaves; a dict per model, stage and cluster with the mean ``share`` over ``clips``
        and its standard error ``se``; and, for two models, ``(ratio, se)`` of the C1 and C2 patches that the first
        keeps to those that the second keeps (standard error by the delta method, paired over clips).
    """
    bins = (len(_MEAN_EDGES) - 1, len(_DEVIATION_EDGES) - 1)
    histograms, means, pairs = np.zeros((1 + len(models), *bins), dtype=np.int64), Means(), []
    for batch in iterate_clips(analysis, "histograms"):
        low = []
        for number, model in enumerate(models):
            values = [model.patch_values(batch.fbank, statistic) for statistic in STATISTICS.values()]  # [B, P] each
            cluster = clusters.assign(clusters.values(model, batch.fbank))
            with torch.inference_mode():
                kept = trace(model, batch.fbank).kept
            if number == 0:
                histograms[0] += _histogram(*values)
            histograms[1 + number] += _histogram(*(value.gather(1, kept[-1]) for value in values))
            for stage, index in enumerate([None, *kept]):
                left = cluster if index is None else cluster.gather(1, index)  # [B, k]
                for i in range(len(clusters.centres)):
                    means.add((left == i).float().mean(1), (number, stage, i))
            low.append((left < _LOW).sum(1).double().cpu())
        pairs.append(torch.stack(low, 1))  # [B, models]
    rows = []
    for number, model in enumerate(models):
        for stage, name in enumerate(stage_names(model)):
            for i in range(len(clusters.centres)):
                share, se, clips = means.of((number, stage, i))
                rows.append({
                    "number": number + 1, "model": model.name, "stage": name, "cluster": f"C{i + 1}", "share": share,
                    "se": se, "clips": clips,
                })  # fmt: skip
    return histograms, rows, ratio_of_means(torch.cat(pairs)) if len(models) == 2 else None


def _histogram(mean, deviation):
    counts, _, _ = np.histogram2d(
        np.clip(mean.cpu().numpy().ravel(), _MEAN_EDGES[0], _MEAN_EDGES[-1]),
        np.clip(deviation.cpu().numpy().ravel(), _DEVIATION_EDGES[0], _DEVIATION_EDGES[-1]),
        (_MEAN_EDGES, _DEVIATION_EDGES),
    )
    return counts.astype(np.int64)


def ratio_of_means(pairs):
    """Ratio of the means of two columns ``[N, 2]`` of paired counts, and its standard error by the delta method."""
    first, second = pairs.double().unbind(1)
    if second.sum() == 0:
        return math.inf if first.sum() > 0 else math.nan, math.nan
    ratio = first.mean() / second.mean()
    se = (first - ratio * second).std() / (second.mean() * len(pairs) ** 0.5)
    return float(ratio), float(se)


def plot_histograms(histograms, rows, clusters, names, title):
    """The patches of the input and of what each model leaves: mean across, deviation up, logarithmic colours."""
    from matplotlib.colors import LogNorm

    Figure = matplotlib_figure()
    count = len(histograms)
    figure = Figure(figsize=(3.6 * count + 0.9, 3.9), dpi=150, layout="constrained")
    axes = figure.subplots(1, count, sharex=True, sharey=True, squeeze=False)[0]
    shares = histograms / histograms.sum((1, 2), keepdims=True)
    norm = LogNorm(shares[shares > 0].min(), shares.max())
    used = shares.sum(0) > 0
    for number, (axis, share, name) in enumerate(zip(axes, shares, ["input", *names])):
        mesh = axis.pcolormesh(_MEAN_EDGES, _DEVIATION_EDGES, np.where(share > 0, share, np.nan).T, norm=norm)
        for boundary in clusters.boundaries:
            axis.axvline(boundary, color=INK, lw=0.7, ls=":")
        stage = "input" if number == 0 else rows[-1]["stage"]
        of = [row for row in rows if row["number"] == max(1, number) and row["stage"] == stage]
        edges = (_MEAN_EDGES[:-1][used.any(1)][0], *clusters.boundaries, _MEAN_EDGES[1:][used.any(1)][-1])
        for row, left, right in zip(of, edges, edges[1:]):
            axis.annotate(
                f"{row['cluster']}\n{row['share']:.0%}", ((left + right) / 2, 0.98), xycoords=("data", "axes fraction"),
                ha="center", va="top", fontsize=7.5, color=INK,
            )  # fmt: skip
        axis.set_title(name, fontsize=9, loc="left", color=INK)
        axis.set_xlabel("mean of a patch (intensity)")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_xlim(edges[0], edges[-1])
    axes[0].set_ylim(0, 1.18 * _DEVIATION_EDGES[1:][used.any(0)][-1])
    axes[0].set_ylabel("standard deviation (variation)")
    figure.colorbar(mesh, ax=list(axes), label="share of the patches", pad=0.01)
    figure.suptitle(title, fontsize=10.5, fontweight="bold", color=INK)
    return figure
