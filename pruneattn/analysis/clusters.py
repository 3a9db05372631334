"""Five groups of patches by intensity or variation (paper, Table III and Fig. 5), from a data set of any size."""

import json
from dataclasses import asdict, dataclass

import numpy as np
import torch

from ..constants import PATCH
from ..errors import UserError
from ..files import atomic_write
from ..models.scores import mean, standard_deviation
from ..plot import INK, log_mel_colours, matplotlib_figure, spectrogram_axis
from .command import example_indices, iterate_clips

#: What patches are grouped by, both on the normalised log-mel.
STATISTICS = {"intensity": mean, "variation": standard_deviation}
#: C1 to C5, dark to light: told apart in grey and by the colour-blind (after viridis).
COLOURS = ("#440154", "#3b528b", "#21918c", "#5ec962", "#fde725")
_STEP = 1e-4  # values closer than this count as one; a hundredth of what moves a boundary visibly


class ValueCounts:
    """Distribution of a stream of numbers in bounded memory: how many fell into each step of ``1e-4``, and their sum.

    Memory is that of the range of the values over the step (some 10^5 numbers), whatever their count.
    """

    def __init__(self):
        self._keys = np.empty(0, dtype=np.int64)
        self.counts = np.empty(0, dtype=np.int64)
        self._sums = np.empty(0)

    def add(self, values):
        """Count a tensor or array of any shape; its numbers must be finite."""
        values = np.asarray(torch.as_tensor(values).detach().double().cpu()).ravel()
        keys = np.concatenate([self._keys, np.floor(values / _STEP).astype(np.int64)])
        counts = np.concatenate([self.counts, np.ones(len(values), dtype=np.int64)])
        sums = np.concatenate([self._sums, values])
        self._keys, place = np.unique(keys, return_inverse=True)
        self.counts = np.bincount(place, counts).astype(np.int64)
        self._sums = np.bincount(place, sums)

    @property
    def values(self):
        """Mean of the numbers in each step that holds any, ascending, float64."""
        return self._sums / self.counts


@dataclass(frozen=True)
class Clusters:
    """Groups C1 to Ck of patches by one statistic, numbered by ascending value.

    Attributes:
        statistic: a key of ``STATISTICS``.
        boundaries: the k - 1 values between neighbouring clusters; a value on a boundary belongs below it.
        centres: mean of each cluster.
        shares: share of the patches in each.
        mean, std: normalisation of the log-mel that the values are in: ``(x - mean) / (2 * std)``.
        clips, patches: what they were found on.
        data: the same in words.
    """

    statistic: str
    boundaries: tuple
    centres: tuple
    shares: tuple
    mean: float
    std: float
    clips: int
    patches: int
    data: str

    def values(self, model, fbank):
        """The statistic of each patch of ``[B, frames, 128]`` in the model's token order, float32 ``[B, P]``."""
        return model.patch_values(fbank, STATISTICS[self.statistic])

    def assign(self, values):
        """Cluster numbers, 0 for C1, of a tensor of values: int64 of the same shape."""
        return torch.bucketize(values, torch.tensor(self.boundaries, device=values.device))

    def save(self, path):
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def load_clusters(path, features):
    """Read what ``Clusters.save`` wrote.

    Raises:
        UserError: there is no such file, it is something else, or it is in units of another normalisation than
            ``features`` (``FeatureConfig``) has.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        clusters = Clusters(**{name: tuple(v) if isinstance(v, list) else v for name, v in content.items()})
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; python/clusters.py makes it") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a clusters.json of python/clusters.py ({error})") from None
    if (clusters.mean, clusters.std) != (features.mean, features.std):
        raise UserError(
            f"{path}: its clusters are in units of mean {clusters.mean:g} and std {clusters.std:g}, the checkpoint's "
            f"input has {features.mean:g} and {features.std:g}; run python/clusters.py with this checkpoint"
        )
    return clusters


def fit_clusters(counts, k=5, seed=0):
    """1-D k-means of a distribution: ``(boundaries, centres, shares)``, by ascending value.

    Args:
        counts: `ValueCounts`.
        k: number of clusters.
        seed: of the starting points, ten of which are tried.

    Raises:
        UserError: there are fewer different values than clusters.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise UserError("clusters need scikit-learn: pip install 'pruneattn[analysis]'") from error
    values, weights = counts.values, counts.counts
    if len(values) < k:
        raise UserError(f"{len(values)} different patch values do not make {k} clusters: use more clips")
    fitted = KMeans(k, n_init=10, random_state=seed).fit(values[:, None], sample_weight=weights)
    centres = np.sort(fitted.cluster_centers_[:, 0])
    boundaries = (centres[1:] + centres[:-1]) / 2
    shares = np.bincount(np.searchsorted(boundaries, values), weights, minlength=k) / weights.sum()
    return tuple(boundaries.tolist()), tuple(centres.tolist()), tuple(shares.tolist())


def find_clusters(analysis, statistic, data, examples=3):
    """Cluster all patches of a data set (padding included, as the paper does).

    Args:
        analysis: `Analysis`; of the model only the input's normalisation and shape matter.
        statistic: a key of ``STATISTICS``.
        data: the data in words.
        examples: how many clips to show in the figure.

    Returns:
        ``(Clusters, ValueCounts, examples)``, the last a list of ``(index, fbank [frames, 128], sounding)``.
    """
    counts, shown, clips = ValueCounts(), [], 0
    wanted = example_indices(analysis, examples)
    for batch in iterate_clips(analysis, "patch values"):
        counts.add(analysis.model.patch_values(batch.fbank, STATISTICS[statistic]))
        for row, index in enumerate(batch.index.tolist()):
            if index in wanted:
                shown.append((index, batch.fbank[row].cpu(), int(batch.sounding[row])))
        clips += len(batch.index)
    boundaries, centres, shares = fit_clusters(counts)
    features = analysis.model.features
    clusters = Clusters(
        statistic, boundaries, centres, shares, features.mean, features.std, clips, int(counts.counts.sum()), data
    )
    return clusters, counts, shown


def cluster_rows(clusters):
    """One dict per cluster: name, share, centre, range, and the patches and clips of the whole."""
    edges = (-np.inf, *clusters.boundaries, np.inf)
    return [
        {
            "cluster": f"C{i + 1}",
            "share": share,
            "centre": centre,
            "above": edges[i],
            "up_to": edges[i + 1],
            "patches": clusters.patches,
            "clips": clusters.clips,
        }
        for i, (share, centre) in enumerate(zip(clusters.shares, clusters.centres))
    ]


def plot_clusters(model, dataset, clusters, counts, examples):
    """Distribution of the statistic with its clusters, above example clips with each patch in its cluster's colour."""
    Figure = matplotlib_figure()
    columns = max(1, len(examples))
    figure = Figure(figsize=(10, 7.2), dpi=150, layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.35))
    axis = top.subplots()
    values, weights = counts.values, counts.counts
    bins = np.linspace(*np.quantile(np.repeat(values, np.minimum(weights, 100)), [0, 0.999]), 121)
    height, _ = np.histogram(values, bins, weights=100 * weights / weights.sum())
    middle = (bins[1:] + bins[:-1]) / 2
    number = np.searchsorted(clusters.boundaries, middle)
    axis.bar(middle, height, width=bins[1] - bins[0], color=[COLOURS[i] for i in number])
    for boundary in clusters.boundaries:
        axis.axvline(boundary, color=INK, lw=0.8, ls=":")
    for i, share in enumerate(clusters.shares):
        inside = middle[number == i]
        if len(inside):
            axis.annotate(
                f"C{i + 1}\n{share:.1%}",
                ((inside[0] + inside[-1]) / 2, 1.02),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="bottom",
                fontsize=8.5,
                color=INK,
            )
    axis.set_xlabel(f"{clusters.statistic} of a patch ({_meaning(clusters.statistic)} of its normalised log-mel)")
    axis.set_ylabel("share of patches (%)")
    axis.spines[["top", "right"]].set_visible(False)
    axes = bottom.subplots(2, columns, sharey=True, squeeze=False)
    for column, (index, fbank, sounding) in enumerate(examples):
        frames, clip = len(fbank), dataset.clips[index]
        label = ", ".join(dataset.labels[i] for i in clip.labels)
        extent = (0, frames / 100, 0, fbank.shape[1])
        style = dict(origin="lower", aspect="auto", interpolation="nearest", extent=extent)
        axes[0, column].imshow(log_mel_colours(np.asarray(fbank), sounding), **style)
        axes[0, column].set_title(f"{label} ({clip.path.stem[:24]})", fontsize=8.5, loc="left", color=INK)
        axes[1, column].imshow(_cluster_image(model, clusters, fbank), **style)
        for row in range(2):
            spectrogram_axis(axes[row, column], frames)
        axes[1, column].set_xlabel("time (s)", fontsize=8)
    for row in range(2):
        axes[row, 0].set_ylabel("mel band (Hz)", fontsize=8)
    figure.suptitle(
        f"Patches by {clusters.statistic}: {clusters.data} ({clusters.patches} patches)",
        fontsize=11,
        fontweight="bold",
        color=INK,
    )
    return figure


def _meaning(statistic):
    return {"intensity": "mean", "variation": "standard deviation"}[statistic]


def _cluster_image(model, clusters, fbank):
    """RGB ``[128, frames, 3]``: each patch in its cluster's colour."""
    from matplotlib.colors import to_rgb

    number = clusters.assign(clusters.values(model, fbank[None].to(next(model.parameters()).device)))[0].cpu()
    time, mel = model.patch_position(torch.arange(model.num_patches))
    grid = np.empty(model.grid[::-1], dtype=int)
    grid[mel, time] = number
    colours = np.array([to_rgb(colour) for colour in COLOURS])[grid]  # [8, columns, 3]
    return colours.repeat(PATCH, 0).repeat(PATCH, 1)
