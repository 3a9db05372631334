"""Selection of the highest-scoring patches: TopK, in patch order."""

from __future__ import annotations

import torch

from ._checks import check_dtype, check_keep, check_shape
from ._layout import together
from ._registration import define
from .backend import _C, launch


def reference(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Define :func:`select_tokens` in plain PyTorch."""
    # A stable descending sort breaks ties towards the lower patch number; NaN sorts above +Inf. The scores are made
    # contiguous because the strides of the results of sort follow its input.
    order = scores.contiguous().sort(dim=1, descending=True, stable=True).indices  # [B, P]
    return order[:, :keep].sort(dim=1).values  # [B, keep]


def select_tokens(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Select the ``keep`` patches with the highest scores of each clip, in ascending order (paper, section 3).

    Of patches with equal scores (+0 and -0 are equal), those with the lower patch numbers are kept. NaN ranks above
    +Inf, as in ``torch.sort``. Not differentiable.

    Args:
        scores: Scores ``[B, P]``, float32, with any strides.
        keep: Number of patches to keep, 1 to P.

    Returns:
        Patch numbers ``[B, keep]``, int64.

    Raises:
        TypeError: ``scores`` is not float32. Half precision would create ties.
        ValueError: ``scores`` is not two-dimensional, or ``keep`` is out of range.
    """
    return _select_tokens(scores, keep)


def check_selection(scores: torch.Tensor, keep: int) -> None:
    """Check the arguments of :func:`select_tokens`."""
    check_shape("scores", scores, "BP")
    check_dtype("scores", scores, (torch.float32,))
    check_keep(keep, scores.shape[1])


def _fake(scores: torch.Tensor, keep: int) -> torch.Tensor:
    return scores.new_empty((scores.shape[0], keep), dtype=torch.int64)


def _compiled(scores: torch.Tensor, keep: int) -> torch.Tensor:
    batch, patches = scores.shape
    if scores.is_cuda and patches > _C.MAX_PATCHES:
        return reference(scores, keep)
    scores = together(scores)
    index = torch.empty((batch, keep), dtype=torch.int64, device=scores.device)
    launch("select_tokens", scores, scores.data_ptr(), batch, patches, scores.stride(0), keep, index.data_ptr())
    return index


_select_tokens = define(
    "select_tokens(Tensor scores, SymInt keep) -> Tensor",
    check=check_selection,
    fake=_fake,
    reference=reference,
    cpu=_compiled,
    cuda=_compiled,
)
