"""Agreement between the attention score and a patch statistic, for each block (paper, Fig. 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..checkpoints.opening import reconfigured
from ..models.trace import trace
from ..models.vit import PrunedViT
from ..plot import FAINT, INK, matplotlib_figure, plain_axis
from ..report import Row
from .clips import Analysis, iterate_clips
from .clusters import Clusters
from .means import Means

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The paper counts ties as agreement, ``(C + ties - D) / pairs``. tau-b omits ties and divides by the remaining pairs.
VARIANTS = ("paper", "tau_b")
_PAIRS_AT_ONCE = 2**23  # bounds the working memory
_STYLES = {"intensity": ("#0072b2", "o"), "variation": ("#d55e00", "s")}


class Kendall(NamedTuple):
    """Kendall's coefficients of each clip, float64 ``[B]``."""

    paper: torch.Tensor
    tau_b: torch.Tensor  # NaN if one side is constant
    tied: torch.Tensor  # fraction of the pairs that are tied: the paper's coefficient of unrelated rankings


def kendall(x: torch.Tensor, y: torch.Tensor) -> Kendall:
    """Kendall's coefficients between the rows of ``x`` and the rows of ``y``, exact, from all pairs.

    With C concordant and D discordant pairs, ``paper`` is ``(C + ties - D) / pairs``, where a pair that is tied in x or
    in y counts as a tie, and ``tau_b`` is ``(C - D) / sqrt((pairs - ties_x) (pairs - ties_y))``.

    Args:
        x: ``[B, P]`` of any dtype, P at least 2.
        y: the same shape on the same device.
    """
    patches = x.shape[1]
    pairs = patches * (patches - 1) / 2
    sums = torch.zeros(4, len(x), dtype=torch.float64, device=x.device)  # C - D, ties, ties in x, ties in y
    rows = max(1, _PAIRS_AT_ONCE // (len(x) * patches))
    for start in range(0, patches, rows):  # every pair twice, and each patch with itself as a tie
        signs_x, signs_y = (torch.sign(v[:, start : start + rows, None] - v[:, None]) for v in (x, y))  # [B, rows, P]
        tied_x, tied_y = signs_x == 0, signs_y == 0
        parts = ((signs_x * signs_y), tied_x | tied_y, tied_x, tied_y)
        sums += torch.stack([part.sum((1, 2), dtype=torch.float64) for part in parts])
    difference = sums[0] / 2
    ties, ties_x, ties_y = (sums[1:] - patches) / 2
    tau_b = difference / ((pairs - ties_x) * (pairs - ties_y)).sqrt()
    return Kendall((difference + ties) / pairs, tau_b, ties / pairs)


def scoring_twin(model: PrunedViT) -> PrunedViT:
    """The same unpruned model with attention scores in every block, in eval mode on the same device.

    If the model's score is not an attention score, the twin has the attention score of its family.
    """
    score = model.score if model.score in ("column_mean", "cls") else model.default_score
    return reconfigured(model, prune_blocks=tuple(range(len(model.blocks))), keep_rate=1.0, score=score)


def measure_kendall(analysis: Analysis, clusters: Sequence[Clusters]) -> list[Row]:
    """Compute the mean coefficient over the clips of a dataset, for every block of the unpruned model.

    Args:
        analysis: model and dataset.
        clusters: clusters of each statistic. The value of a patch is the number of its cluster.

    Returns:
        One dict per statistic, block (from 1) and variant: ``coefficient``; its standard error ``se`` over clips; the
        number of ``clips`` in the mean (a clip whose patches are all in one cluster has no tau-b); and ``unrelated``,
        the coefficient of two unrelated rankings, which in the paper's variant is the fraction of tied pairs.
    """
    model = scoring_twin(analysis.model)
    depth = len(model.blocks)
    means = Means()
    for batch in iterate_clips(analysis, "kendall"):
        with torch.inference_mode():
            scores = trace(model, batch.fbank).scores  # [B, P] of each block
        for i, one in enumerate(clusters):
            numbers = one.assign(one.values(model, batch.fbank))  # [B, P]
            for block in range(depth):
                for name, values in kendall(scores[block], numbers)._asdict().items():
                    means.add(values, (i, block, name))
    rows = []
    for i, one in enumerate(clusters):
        for block in range(depth):
            for variant in VARIANTS:
                mean, se, clips = means.of((i, block, variant))
                rows.append(
                    {
                        "statistic": one.statistic,
                        "block": block + 1,
                        "variant": variant,
                        "coefficient": mean,
                        "se": se,
                        "clips": clips,
                        "unrelated": means.of((i, block, "tied"))[0] if variant == "paper" else 0.0,
                    }
                )
    return rows


def plot_kendall(rows: Sequence[Row], title: str, prune_blocks: Sequence[int] = ()) -> Figure:
    """Draw the coefficient by block, with a color for each statistic.

    Solid lines show the paper's variant, dashed lines tau-b, and dotted lines the paper's variant for unrelated
    rankings, whose tau-b is 0. Pruning blocks are shaded.

    Args:
        rows: rows of ``measure_kendall``.
        title: title of the figure.
        prune_blocks: numbers of the pruning blocks, from 0.

    Returns:
        matplotlib ``Figure``.
    """
    Figure = matplotlib_figure()
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axis = figure.subplots()
    for block in prune_blocks:
        axis.axvspan(block + 0.6, block + 1.4, color="#eeeeee", lw=0, zorder=0)
    axis.axhline(0, color=FAINT, lw=0.8)
    for statistic in dict.fromkeys(row["statistic"] for row in rows):
        color, marker = _STYLES[statistic]
        for variant, line, face, name in (("paper", "-", color, "paper's"), ("tau_b", "--", "white", "tau-b")):
            mine = [row for row in rows if row["statistic"] == statistic and row["variant"] == variant]
            axis.errorbar(
                [row["block"] for row in mine],
                [row["coefficient"] for row in mine],
                [row["se"] for row in mine],
                color=color,
                ls=line,
                marker=marker,
                mfc=face,
                ms=5,
                lw=1.4,
                capsize=2.5,
                label=f"{statistic}, {name}",
            )
            if variant == "paper":
                axis.plot([row["block"] for row in mine], [row["unrelated"] for row in mine], ":", color=color, lw=1)
    axis.set_xticks(sorted({row["block"] for row in rows}))
    shaded = "pruning blocks shaded; " if prune_blocks else ""
    axis.set_xlabel(f"block ({shaded}dotted: the paper's coefficient of unrelated rankings)")
    axis.set_ylabel("Kendall's coefficient\nwith the attention score")
    plain_axis(axis)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    axis.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK)
    return figure
