"""What the unpruned model does without the tokens of some clusters (paper, Table IV)."""

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import UserError
from ..plot import FAINT, INK, matplotlib_figure, plain_axis
from .command import iterate_clips
from .paired import metric_name, paired_test, unit_scores

#: What is removed: the two lowest or the two highest of the five clusters.
REMOVED = {"low": (0, 1), "high": (3, 4)}
_STYLES = {"low": ("#0072b2", "o", "-"), "high": ("#d55e00", "s", "--")}


def default_depths(depth):
    """Six numbers of blocks, spread evenly from none to five sixths."""
    return sorted({i * depth // 6 for i in range(6)})


def check_depths(after_blocks, depth):
    """Raise ``UserError`` for a depth at which removing tokens means nothing."""
    for number in after_blocks:
        if not 0 <= number < depth:
            raise UserError(f"--after-block {number}: must be from 0 (before the first) to {depth - 1}")


def run_block(block, x, present=None):
    """A block without pruning on ``x`` ``[B, N, C]``; tokens that are not ``present`` (bool ``[B, N]``) are not seen.

    Everything but attention acts row by row, so hiding a token as a key is the same as taking it out.
    """
    y = block.norm1(x)
    if present is None:
        return block.finish(x, block.attn(y))
    q, k, v = block.attn.project(y, "qkv")
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=present[:, None, None])  # [B, H, N, D]
    return block.finish(x, block.attn.merge_heads(attended))


def finish_without(model, x, removed, after):
    """Logits of a batch that loses some of its patches after ``after`` blocks.

    Args:
        model: ``PrunedViT``; its keep-rates do not matter.
        x: tokens after so many blocks, ``[B, extra + P, C]``.
        removed: bool ``[B, P]``, with any number of patches per clip. A clip that loses all goes on with its extra
            tokens alone; AudioMAE, whose feature is the mean of the patches left, takes 0 for it.
        after: number of blocks done.

    Returns:
        ``[B, num_classes]``.
    """
    extra, kept = model.num_extra_tokens, (~removed).sum(1)  # [B]
    longest = int(kept.max())
    places = removed.byte().argsort(dim=1, stable=True)[:, :longest]  # [B, longest]: patches left, then padding
    patches = x[:, extra:].gather(1, places.unsqueeze(2).expand(-1, -1, x.shape[2]))
    x = torch.cat([x[:, :extra], patches], dim=1)  # [B, extra + longest, C]
    present = torch.arange(longest, device=x.device) < kept.unsqueeze(1)  # [B, longest]
    seen = F.pad(present, (extra, 0), value=True)
    for block in model.blocks[after:]:
        x = run_block(block, x, seen)
    # The heads read the extra tokens or the mean over the patches: one patch token that is this mean serves both.
    total = (x[:, extra:] * present.unsqueeze(2)).sum(1, keepdim=True)  # [B, 1, C]
    mean = total / kept.clamp(min=1).view(-1, 1, 1)
    return model.forward_head(torch.cat([x[:, :extra], mean], dim=1))


@torch.inference_mode()
def logits_without(model, fbank, clusters, after_blocks):
    """Logits of a batch, unpruned and without clusters at every depth; the blocks before run once for all of them.

    Args:
        model: ``PrunedViT`` in eval mode.
        fbank: ``[B, frames, 128]``.
        clusters: `Clusters`.
        after_blocks: ascending numbers of blocks.

    Returns:
        ``(unpruned [B, K], {(after, name): [B, K]}, {name: share of the patches removed [B]})``.
    """
    numbers = clusters.assign(clusters.values(model, fbank))  # [B, P]
    removed = {name: torch.isin(numbers, numbers.new_tensor(which)) for name, which in REMOVED.items()}
    x = model.prepend_extra_tokens(model.embed(fbank))  # [B, N, C]
    logits = {}
    for done in range(len(model.blocks)):
        if done in after_blocks:
            for name, which in removed.items():
                logits[done, name] = finish_without(model, x, which, done)
        x = run_block(model.blocks[done], x)
    return model.forward_head(x), logits, {name: which.float().mean(1) for name, which in removed.items()}


def measure_removal(analysis, clusters, after_blocks):
    """The metric without low or high clusters, against the unpruned model on the same clips.

    Every clip's logits are kept to the end, 4 bytes for each class and cell of the table, since mAP needs them all.

    Returns:
        One dict per depth and kind of removal: ``metric``, ``unpruned``, their ``difference`` with its standard error
        and p-value (paired t-test over clips, over classes for mAP), ``tokens_removed`` (mean share of the patches),
        ``clips`` and ``clips_without_tokens``, which lost every patch and count all the same.
    """
    model = analysis.model
    dense, found, shares, targets = [], {}, {name: [] for name in REMOVED}, []
    for batch in iterate_clips(analysis, "remove clusters"):
        unpruned, logits, removed = logits_without(model, batch.fbank, clusters, after_blocks)
        dense.append(unpruned.cpu())
        targets.append(batch.targets)
        for cell, values in logits.items():
            found.setdefault(cell, []).append(values.cpu())
        for name, share in removed.items():
            shares[name].append(share.cpu())
    targets, shares = torch.cat(targets).numpy(), {name: torch.cat(parts) for name, parts in shares.items()}
    unpruned = unit_scores(torch.cat(dense).numpy(), targets, model.multilabel)
    rows = []
    for (after, name), parts in found.items():
        units = unit_scores(torch.cat(parts).numpy(), targets, model.multilabel)
        rows.append(
            {
                "after_block": after,
                "removed": name,
                "metric_name": metric_name(model.multilabel),
                "metric": float(np.nanmean(units)),
                "unpruned": float(np.nanmean(unpruned)),
                **paired_test(units - unpruned),
                "tokens_removed": float(shares[name].mean()),
                "clips": len(targets),
                "clips_without_tokens": int((shares[name] == 1).sum()),
            }
        )
    return rows


def plot_removal(rows, title):
    """Metric by depth of removal, a line for the low and one for the high clusters, beside the unpruned model."""
    Figure = matplotlib_figure()
    figure = Figure(figsize=(6.2, 4.2), dpi=150, layout="constrained")
    axis = figure.subplots()
    axis.axhline(100 * rows[0]["unpruned"], color=FAINT, lw=1, ls=":", label="nothing removed")
    for name, (colour, marker, line) in _STYLES.items():
        mine = [row for row in rows if row["removed"] == name]
        which = " and ".join(f"C{i + 1}" for i in REMOVED[name])
        axis.errorbar(
            [row["after_block"] for row in mine],
            [100 * row["metric"] for row in mine],
            [100 * row["difference_se"] for row in mine],
            color=colour,
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
