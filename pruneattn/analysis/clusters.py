"""Five groups of patches by intensity or variation (paper, Table III and Fig. 5), from a dataset of any size."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..constants import HOP, MEL_BINS, PATCH, SAMPLE_RATE
from ..data import FeatureConfig
from ..data.clips import ClipDataset
from ..errors import UserError
from ..files import write_json
from ..models.scores import mean, standard_deviation
from ..models.vit import PrunedViT
from ..plot import BLANK, INK, covered_cells, log_mel_colors, matplotlib_figure, spectrogram_axis
from ..report import Row
from .clips import Analysis, describe_data, example_indices, features_of, iterate_clips

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Statistics that patches are grouped by, each of the normalized log-mel of a patch.
STATISTICS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"intensity": mean, "variation": standard_deviation}
#: Colors of C1 to C5, from dark to light. They also differ in gray and for color-blind readers (after viridis).
COLORS = ("#440154", "#3b528b", "#21918c", "#5ec962", "#fde725")
_MEANING = {"intensity": "mean", "variation": "standard deviation"}
_STEP = 1e-4  # closer values are counted as one value; a visible shift of a boundary is a hundred times larger


class ValueCounts:
    """Distribution of a stream of numbers in bounded memory: the count and the sum of the numbers in each step of 1e-4.

    Memory grows with the range of the values (about 10^5 steps), not with their count.
    """

    def __init__(self) -> None:
        self._keys: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self.counts: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._sums: NDArray[np.float64] = np.empty(0)

    def add(self, values: torch.Tensor | NDArray[np.floating]) -> None:
        """Count the numbers of a tensor or an array of any shape. They must be finite."""
        numbers = np.asarray(torch.as_tensor(values).detach().double().cpu()).ravel()
        keys = np.concatenate([self._keys, np.floor(numbers / _STEP).astype(np.int64)])
        counts = np.concatenate([self.counts, np.ones(len(numbers), dtype=np.int64)])
        sums = np.concatenate([self._sums, numbers])
        self._keys, place = np.unique(keys, return_inverse=True)
        self.counts = np.bincount(place, counts).astype(np.int64)
        self._sums = np.bincount(place, sums).astype(np.float64)

    @property
    def values(self) -> NDArray[np.float64]:
        """Mean of the numbers in each step that contains any, ascending."""
        return self._sums / self.counts


@dataclass(frozen=True)
class Clusters:
    """Groups C1 to Ck of patches by one statistic, numbered by ascending value.

    Attributes:
        statistic: a key of ``STATISTICS``.
        boundaries: the k - 1 values between adjacent clusters. A value on a boundary belongs to the lower cluster.
        centres: mean of each cluster.
        shares: fraction of the patches in each cluster.
        mean: mean in the normalization ``(x - mean) / (2 * std)`` of the log-mel that the values refer to.
        std: standard deviation in this normalization.
        clips: number of clips that the clusters were computed from.
        patches: number of their patches.
        data: the data in a few words.
    """

    statistic: str
    boundaries: tuple[float, ...]
    centres: tuple[float, ...]
    shares: tuple[float, ...]
    mean: float
    std: float
    clips: int
    patches: int
    data: str

    def values(self, model: PrunedViT, fbank: torch.Tensor) -> torch.Tensor:
        """The statistic of each patch of ``[B, frames, 128]`` in the model's token order, float32 ``[B, P]``."""
        return model.patch_values(fbank, STATISTICS[self.statistic])

    def assign(self, values: torch.Tensor) -> torch.Tensor:
        """Cluster numbers, 0 for C1, of a tensor of values: int64 of the same shape."""
        return torch.bucketize(values, torch.tensor(self.boundaries, device=values.device))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file for ``load_clusters``."""
        write_json(path, asdict(self))


def load_clusters(path: str | os.PathLike[str], features: FeatureConfig) -> Clusters:
    """Read a file of ``Clusters.save``.

    Args:
        path: the file.
        features: features of the model that the clusters are for.

    Raises:
        UserError: the file does not exist, has other content, or has clusters of another normalization than
            ``features``.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in content.items()}
        clusters = Clusters(**values)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: create it with pruneattn analyze clusters") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a clusters.json of pruneattn analyze clusters ({error})") from None
    if (clusters.mean, clusters.std) != (features.mean, features.std):
        raise UserError(
            f"{path}: the clusters are for an input with mean {clusters.mean:g} and std {clusters.std:g}, but the "
            f"checkpoint's input has {features.mean:g} and {features.std:g}: run pruneattn analyze clusters with this "
            "checkpoint"
        )
    return clusters


def fit_clusters(
    counts: ValueCounts, k: int = 5, seed: int = 0
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    """k-means of a distribution in one dimension.

    Args:
        counts: the distribution.
        k: number of clusters.
        seed: seed of the ten starting points; the best result is used.

    Returns:
        ``(boundaries, centers, shares)`` of the clusters by ascending value.

    Raises:
        UserError: there are fewer distinct values than clusters, or scikit-learn is not installed.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise UserError(
            "clusters need scikit-learn, which is not installed: pip install 'pruneattn[analysis]'"
        ) from error
    values, weights = counts.values, counts.counts
    if len(values) < k:
        raise UserError(f"{len(values)} distinct patch values are too few for {k} clusters: use more clips")
    fitted = KMeans(k, n_init=10, random_state=seed).fit(values[:, None], sample_weight=weights)
    centers = np.sort(fitted.cluster_centers_[:, 0])
    boundaries = (centers[1:] + centers[:-1]) / 2
    shares = np.bincount(np.searchsorted(boundaries, values), weights, minlength=k) / weights.sum()
    return tuple(boundaries.tolist()), tuple(centers.tolist()), tuple(shares.tolist())


class Example(NamedTuple):
    """A clip to show."""

    # Number in the dataset. The name hides the method of tuple.
    index: int  # type: ignore[assignment]
    fbank: torch.Tensor  # float32 [frames, 128], on the CPU
    sounding: int  # number of frames that contain sound


def find_clusters(analysis: Analysis, statistic: str, examples: int = 3) -> tuple[Clusters, ValueCounts, list[Example]]:
    """Cluster all patches of a dataset, including padding, as in the paper.

    Args:
        analysis: model and dataset. Only the normalization and the shape of the model's input matter.
        statistic: a key of ``STATISTICS``.
        examples: number of clips to show in the figure.

    Returns:
        The clusters, the distribution of the statistic, and the clips to show.
    """
    features = features_of(analysis.model)
    counts, clips = ValueCounts(), 0
    shown: list[Example] = []
    wanted = example_indices(analysis, examples)
    for batch in iterate_clips(analysis, "patch values"):
        counts.add(analysis.model.patch_values(batch.fbank, STATISTICS[statistic]))
        for row, index in enumerate(batch.index.tolist()):
            if index in wanted:
                shown.append(Example(index, batch.fbank[row].cpu(), int(batch.sounding[row])))
        clips += len(batch.index)
    boundaries, centers, shares = fit_clusters(counts)
    clusters = Clusters(
        statistic,
        boundaries,
        centers,
        shares,
        features.mean,
        features.std,
        clips,
        int(counts.counts.sum()),
        describe_data(analysis),
    )
    return clusters, counts, shown


def cluster_rows(clusters: Clusters) -> list[Row]:
    """One dict per cluster: its name, share, center and range, and the numbers of all patches and clips."""
    edges = (-np.inf, *clusters.boundaries, np.inf)
    return [
        {
            "cluster": f"C{i + 1}",
            "share": share,
            "centre": center,
            "above": edges[i],
            "up_to": edges[i + 1],
            "patches": clusters.patches,
            "clips": clusters.clips,
        }
        for i, (share, center) in enumerate(zip(clusters.shares, clusters.centres, strict=True))
    ]


def plot_clusters(
    model: PrunedViT, dataset: ClipDataset, clusters: Clusters, counts: ValueCounts, examples: Sequence[Example]
) -> Figure:
    """Draw the distribution of the statistic with its clusters, and example clips with each patch in its color.

    Where patches overlap, a cell has the color of the patch whose center is nearest; of two, that of the lower one in
    time or mel. Cells that no patch covers are blank.

    Args:
        model: model of the token order and the stride.
        dataset: dataset of the examples, for their names.
        clusters: the clusters.
        counts: distribution of the statistic.
        examples: clips to show.

    Returns:
        matplotlib ``Figure``.
    """
    Figure = matplotlib_figure()
    columns = max(1, len(examples))
    figure = Figure(figsize=(10, 7.2), dpi=150, layout="constrained")
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=(1, 1.35))[:, 0]
    _draw_distribution(top.subplots(), clusters, counts)
    axes = bottom.subplots(2, columns, sharey=True, squeeze=False)
    for column, (index, fbank, sounding) in enumerate(examples):
        frames, clip = len(fbank), dataset.clips[index]
        label = ", ".join(dataset.labels[i] for i in clip.labels)
        extent = (0, frames * HOP / SAMPLE_RATE, 0, MEL_BINS)
        images = (log_mel_colors(np.asarray(fbank), sounding), _cluster_image(model, clusters, fbank))
        for axis, image in zip(axes[:, column], images, strict=True):
            axis.imshow(image, origin="lower", aspect="auto", interpolation="nearest", extent=extent)
            spectrogram_axis(axis, frames)
        axes[0, column].set_title(f"{label} ({clip.path.stem[:24]})", fontsize=8.5, loc="left", color=INK)
        axes[1, column].set_xlabel("time (s)", fontsize=8)
    for row in range(2):
        axes[row, 0].set_ylabel("mel band (Hz)", fontsize=8)
    if min(model.stride) < PATCH:
        bottom.supxlabel("patches overlap: each cell has the color of the patch with the nearest center", fontsize=8)
    figure.suptitle(
        f"Patches by {clusters.statistic}: {clusters.data} ({clusters.patches} patches)",
        fontsize=11,
        fontweight="bold",
        color=INK,
    )
    return figure


def _draw_distribution(axis: Axes, clusters: Clusters, counts: ValueCounts) -> None:
    values, weights = counts.values, counts.counts
    low, high = np.quantile(np.repeat(values, np.minimum(weights, 100)), [0, 0.999])
    bins = np.linspace(low, high, 121)
    height, _ = np.histogram(values, bins, weights=100 * weights / weights.sum())
    middle = (bins[1:] + bins[:-1]) / 2
    number = np.searchsorted(clusters.boundaries, middle)
    axis.bar(middle, height, width=bins[1] - bins[0], color=[COLORS[i] for i in number])
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
    axis.set_xlabel(f"{clusters.statistic} of a patch ({_MEANING[clusters.statistic]} of its normalized log-mel)")
    axis.set_ylabel("share of patches (%)")
    axis.spines[["top", "right"]].set_visible(False)


def nearest_patches(size: int, step: int, patches: int) -> NDArray[np.int64]:
    """Number of the patch with the nearest center for each cell along one axis; of two, the lower number.

    Args:
        size: number of cells.
        step: cells from one patch to the next.
        patches: number of patches.

    Returns:
        int64 array ``[size]``.
    """
    centers = PATCH / 2 + step * np.arange(patches)
    return np.abs(np.arange(size)[:, None] + 0.5 - centers).argmin(1)


def _cluster_image(model: PrunedViT, clusters: Clusters, fbank: torch.Tensor) -> NDArray[np.float64]:
    """RGB ``[128, frames, 3]``: each cell in the cluster's color of the patch with the nearest center."""
    from matplotlib.colors import to_rgb

    number = clusters.assign(clusters.values(model, fbank[None].to(next(model.parameters()).device)))[0].cpu()
    time, mel = model.patch_position(torch.arange(model.num_patches))
    grid = np.empty(model.grid[::-1], dtype=int)
    grid[mel, time] = number
    frames, (columns, rows), (of_frequency, of_time) = len(fbank), model.grid, model.stride
    place = np.ix_(nearest_patches(MEL_BINS, of_frequency, rows), nearest_patches(frames, of_time, columns))
    colors = np.array([to_rgb(color) for color in COLORS])[grid[place]]  # [128, frames, 3]
    covered = covered_cells(np.ones_like(grid, dtype=bool), frames, model.stride)
    return np.where(covered[..., None], colors, BLANK)
