"""Accuracy of the unpruned model without the tokens of some clusters (paper, Table IV)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import UserError
from ..models.blocks import Block
from ..models.vit import PrunedViT
from ..plot import FAINT, INK, matplotlib_figure, plain_axis
from ..report import Row
from .clips import Analysis, iterate_clips
from .clusters import Clusters
from .paired import metric_name, paired_test, unit_scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Numbers of the removed clusters: the two lowest or the two highest of the five.
REMOVED = {"low": (0, 1), "high": (3, 4)}
_STYLES = {"low": ("#0072b2", "o", "-"), "high": ("#d55e00", "s", "--")}


def default_depths(depth: int) -> list[int]:
    """Six numbers of blocks, evenly spaced from 0 to five sixths of the depth."""
    return sorted({i * depth // 6 for i in range(6)})


def check_depths(after_blocks: Iterable[int], depth: int) -> None:
    """Raise ``UserError`` unless a block follows each removal."""
    for number in after_blocks:
        if not 0 <= number < depth:
            raise UserError(f"--after-block {number}: must be from 0 (before the first) to {depth - 1}")


def _blocks(model: PrunedViT) -> list[Block]:
    return cast("list[Block]", [*model.blocks])  # ModuleList has no type for its modules


def run_block(block: Block, x: torch.Tensor, present: torch.Tensor | None = None) -> torch.Tensor:
    """Run a block without pruning on ``x`` ``[B, N, C]``; tokens that are not ``present`` (bool ``[B, N]``) are masked.

    Everything except attention acts on each row separately, so masking a token as a key is the same as removing it.
    """
    y = block.norm1(x)
    if present is None:
        return block.finish(x, block.attn(y))
    q, k, v = block.attn.project(y, "qkv")
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=present[:, None, None])  # [B, H, N, D]
    return block.finish(x, block.attn.merge_heads(attended))


def finish_without(model: PrunedViT, x: torch.Tensor, removed: torch.Tensor, after: int) -> torch.Tensor:
    """Logits of a batch when some patches are removed after ``after`` blocks.

    Args:
        model: model; its keep-rates do not matter.
        x: tokens after ``after`` blocks, ``[B, extra + P, C]``.
        removed: bool ``[B, P]``, with any number of patches per clip. If a clip loses all patches, only its extra
            tokens remain; AudioMAE, whose feature is the mean of the remaining patches, then uses 0.
        after: number of blocks that have run.

    Returns:
        ``[B, num_classes]``.
    """
    extra, kept = model.num_extra_tokens, (~removed).sum(1)  # [B]
    longest = int(kept.max())
    places = removed.byte().argsort(dim=1, stable=True)[:, :longest]  # [B, longest]: remaining patches, then padding
    patches = x[:, extra:].gather(1, places.unsqueeze(2).expand(-1, -1, x.shape[2]))
    x = torch.cat([x[:, :extra], patches], dim=1)  # [B, extra + longest, C]
    present = torch.arange(longest, device=x.device) < kept.unsqueeze(1)  # [B, longest]
    seen = F.pad(present, (extra, 0), value=True)
    for block in _blocks(model)[after:]:
        x = run_block(block, x, seen)
    # A head reads the extra tokens or the mean over the patches. One patch token that is this mean serves both.
    total = (x[:, extra:] * present.unsqueeze(2)).sum(1, keepdim=True)  # [B, 1, C]
    mean = total / kept.clamp(min=1).view(-1, 1, 1)
    return model.forward_head(torch.cat([x[:, :extra], mean], dim=1))


@torch.inference_mode()
def logits_without(
    model: PrunedViT, fbank: torch.Tensor, clusters: Clusters, after_blocks: Collection[int]
) -> tuple[torch.Tensor, dict[tuple[int, str], torch.Tensor], dict[str, torch.Tensor]]:
    """Logits of a batch, unpruned and without clusters at every depth. The blocks before a removal run only once.

    Args:
        model: model in eval mode.
        fbank: ``[B, frames, 128]``.
        clusters: clusters by any statistic.
        after_blocks: numbers of blocks before a removal.

    Returns:
        ``(unpruned [B, K], {(after, name): [B, K]}, {name: fraction of the patches removed [B]})``.
    """
    numbers = clusters.assign(clusters.values(model, fbank))  # [B, P]
    removed = {name: torch.isin(numbers, numbers.new_tensor(which)) for name, which in REMOVED.items()}
    x = model.prepend_extra_tokens(model.embed(fbank))  # [B, N, C]
    logits = {}
    for done, block in enumerate(_blocks(model)):
        if done in after_blocks:
            for name, which in removed.items():
                logits[done, name] = finish_without(model, x, which, done)
        x = run_block(block, x)
    return model.forward_head(x), logits, {name: which.float().mean(1) for name, which in removed.items()}


def measure_removal(analysis: Analysis, clusters: Clusters, after_blocks: Collection[int]) -> list[Row]:
    """Compute the metric without low or high clusters, and compare it with the unpruned model on the same clips.

    The logits of all clips stay in memory, 4 bytes for each class and cell of the table, because mAP needs all of them.

    Args:
        analysis: model and dataset.
        clusters: clusters by any statistic.
        after_blocks: numbers of blocks before a removal.

    Returns:
        One dict per depth and kind of removal: ``metric``, ``unpruned``, their ``difference`` with its standard error
        and p-value (paired t-test over clips, over classes for mAP), ``tokens_removed`` (mean fraction of the patches),
        ``clips``, and ``clips_without_tokens``, the number of clips that lost every patch. The metric includes
        these clips.
    """
    model = analysis.model
    multilabel = bool(model.multilabel)
    dense: list[torch.Tensor] = []
    targets: list[torch.Tensor] = []
    found: dict[tuple[int, str], list[torch.Tensor]] = {}
    removed_shares: dict[str, list[torch.Tensor]] = {name: [] for name in REMOVED}
    for batch in iterate_clips(analysis, "remove clusters"):
        unpruned, logits, removed = logits_without(model, batch.fbank, clusters, after_blocks)
        dense.append(unpruned.cpu())
        targets.append(batch.targets)
        for cell, values in logits.items():
            found.setdefault(cell, []).append(values.cpu())
        for name, share in removed.items():
            removed_shares[name].append(share.cpu())
    all_targets = torch.cat(targets).numpy()
    shares = {name: torch.cat(parts) for name, parts in removed_shares.items()}
    reference = unit_scores(torch.cat(dense).numpy(), all_targets, multilabel)
    rows = []
    for (after, name), parts in found.items():
        units = unit_scores(torch.cat(parts).numpy(), all_targets, multilabel)
        rows.append(
            {
                "after_block": after,
                "removed": name,
                "metric_name": metric_name(multilabel),
                "metric": float(np.nanmean(units)),
                "unpruned": float(np.nanmean(reference)),
                **paired_test(units - reference),
                "tokens_removed": float(shares[name].mean()),
                "clips": len(all_targets),
                "clips_without_tokens": int((shares[name] == 1).sum()),
            }
        )
    return rows


def plot_removal(rows: Sequence[Row], title: str) -> Figure:
    """Draw the metric by depth of removal: lines for the low clusters, the high clusters and the unpruned model.

    Args:
        rows: rows of ``measure_removal``.
        title: title of the figure.

    Returns:
        matplotlib ``Figure``.
    """
    Figure = matplotlib_figure()
    figure = Figure(figsize=(6.2, 4.2), dpi=150, layout="constrained")
    axis = figure.subplots()
    axis.axhline(100 * rows[0]["unpruned"], color=FAINT, lw=1, ls=":", label="nothing removed")
    for name, (color, marker, line) in _STYLES.items():
        mine = [row for row in rows if row["removed"] == name]
        which = " and ".join(f"C{i + 1}" for i in REMOVED[name])
        axis.errorbar(
            [row["after_block"] for row in mine],
            [100 * row["metric"] for row in mine],
            [100 * row["difference_se"] for row in mine],
            color=color,
            marker=marker,
            ls=line,
            ms=5,
            lw=1.4,
            capsize=3,
            label=f"without {which} ({mine[0]['tokens_removed']:.0%} of the tokens)",
        )
    axis.set_xticks([row["after_block"] for row in rows])
    axis.set_xlabel("removed after block (0: before the first)")
    axis.set_ylabel(f"{rows[0]['metric_name']} (%)")
    plain_axis(axis)
    axis.legend(frameon=False, fontsize=8.5)
    axis.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK)
    return figure
