"""Mean and deviation of the patches before and after pruning, model against model (paper, Fig. 6)."""

import copy
import math

import numpy as np
import torch

from ..cli import open_checkpoint
from ..data.fbank import LOG_FLOOR
from ..errors import UserError
from ..models.trace import trace
from ..plot import INK, matplotlib_figure
from .clusters import STATISTICS
from .command import iterate_clips
from .kept_patches import stage_names
from .means import Means

# Range of a patch before normalisation: from Kaldi's floor to above what sound within full scale reaches. What lies
# beyond counts in the outermost bin.
_MEAN_EDGES = np.linspace(LOG_FLOOR, 10, 91)
_DEVIATION_EDGES = np.linspace(0, 12, 81)
_LOW = 2  # C1 and C2


def bin_edges(features):
    """Edges of the bins of mean and deviation in units of the normalised log-mel, float64 arrays."""
    return (_MEAN_EDGES - features.mean) / (2 * features.std), _DEVIATION_EDGES / (2 * features.std)


def open_second(analysis, checkpoint, model=None):
    """Another checkpoint to hold against ``analysis.model`` on the same clips, on the same device.

    Args:
        analysis: `Analysis`.
        checkpoint: path of the second.
        model: name of its model if it is of another project (AST, AudioMAE, Hugging Face, timm): it does not say what
            it reads, and is given what ``analysis.model`` reads.

    Raises:
        UserError: it reads another input (frames, normalisation or padding).
    """
    args = copy.copy(analysis.args)
    args.checkpoint, args.model = checkpoint, model
    args.num_classes = args.frames = args.mean = args.std = None
    features = analysis.model.features
    if model is not None:
        args.num_classes = analysis.model.num_classes
        args.frames, args.mean, args.std, args.padding = features.frames, features.mean, features.std, features.padding
    second = open_checkpoint(args, args.dataset).to(analysis.device)
    ours, theirs = features.to_dict(), second.features.to_dict()
    different = [f"{name} {ours[name]} and {theirs[name]}" for name in ours if ours[name] != theirs[name]]
    if different:
        raise UserError(
            f"--against {checkpoint}: the two checkpoints read different input ({', '.join(different)}); "
            "compare models that were trained on the same features"
        )
    return second


def measure_histograms(analysis, models, clusters):
    """Histograms and cluster shares of the patches that each model leaves, in one pass over the clips.

    Args:
        analysis: `Analysis`, whose clips are used.
        models: one or two ``PrunedViT`` with the same input, at the keep-rates wanted.
        clusters: `Clusters` by intensity.

    Returns:
        ``(histograms, rows, ratio)``: counts int64 ``[1 + models, 90, 80]`` (bins of ``bin_edges``) of the input and
        of what each model's last stage leaves; a dict per model, stage and cluster with the mean ``share`` of the
        ``patches`` left of a clip over ``clips`` and its standard error ``se``; and, for two models, a dict of the C1
        and C2 patches that each keeps of a clip, their ``ratio`` and its standard error ``se``.
    """
    edges = bin_edges(models[0].features)
    bins = [len(edge) - 1 for edge in edges]
    histograms, means, pairs = np.zeros((1 + len(models), *bins), dtype=np.int64), Means(), []
    counts = {}  # patches of a clip by model and stage
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


def _ratio_row(models, pairs):
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


def _histogram(values, edges):
    inside = [np.clip(value.cpu().numpy().ravel(), edge[0], edge[-1]) for value, edge in zip(values, edges)]
    return np.histogram2d(*inside, edges)[0].astype(np.int64)


def ratio_of_means(pairs):
    """Ratio of the means of two columns ``[N, 2]`` of paired counts, and its standard error by the delta method.

    Clips, not patches, are the sample: a clip that is quiet for one model is so for the other, which the pairs keep.
    Infinite or NaN, with a NaN error, where the second column is 0; a NaN error for one clip.
    """
    first, second = pairs.double().unbind(1)
    if second.sum() == 0:
        return math.inf if first.sum() > 0 else math.nan, math.nan
    ratio = first.mean() / second.mean()
    variance = (first - ratio * second).square().sum() / (len(pairs) - 1) if len(pairs) > 1 else math.nan
    return float(ratio), float((variance / len(pairs)) ** 0.5 / second.mean())


def plot_histograms(histograms, rows, clusters, edges, names, title):
    """The patches of the input and of what each model leaves: mean across, deviation up, logarithmic colours.

    Args:
        histograms, rows: of ``measure_histograms``.
        clusters: `Clusters` by intensity, whose boundaries are drawn.
        edges: of ``bin_edges``.
        names: title of each model's panel.
        title: over the whole figure.
    """
    from matplotlib.colors import LogNorm

    Figure = matplotlib_figure()
    count = len(histograms)
    figure = Figure(figsize=(3.6 * count + 0.9, 3.9), dpi=150, layout="constrained")
    axes = figure.subplots(1, count, sharex=True, sharey=True, squeeze=False)[0]
    shares = histograms / histograms.sum((1, 2), keepdims=True)
    norm = LogNorm(shares[shares > 0].min(), shares.max())
    used = shares.sum(0) > 0  # [mean bins, deviation bins]
    across, up = edges
    left, right, top = across[:-1][used.any(1)][0], across[1:][used.any(1)][-1], 1.18 * up[1:][used.any(0)][-1]
    columns = (min(left, clusters.boundaries[0]), *clusters.boundaries, max(right, clusters.boundaries[-1]))
    for number, (axis, share, name) in enumerate(zip(axes, shares, ["input", *names])):
        visible = np.where(share > 0, share, np.nan)
        mesh = axis.pcolormesh(across, up, visible.T, norm=norm)
        for boundary in clusters.boundaries:
            axis.axvline(boundary, color=INK, lw=0.7, ls=":")
        of = [row for row in rows if row["number"] == max(1, number)]
        stage = of[0 if number == 0 else -1]["stage"]
        of = [row for row in of if row["stage"] == stage]
        for row, begin, end in zip(of, columns, columns[1:]):
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
