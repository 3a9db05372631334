"""Selection of the highest-scoring patches: TopK, in patch order."""

import torch

from ._checks import check_dtype, check_keep, check_shape
from ._layout import together
from ._registration import define
from .backend import _C, launch


def reference(scores, keep):
    """The definition of :func:`select_tokens` in plain PyTorch."""
    # A stable descending sort breaks ties towards the lower patch number; NaN sorts above +Inf. Contiguous, because the
    # strides of what sort returns follow its input.
    order = scores.contiguous().sort(dim=1, descending=True, stable=True).indices  # [B, P]
    return order[:, :keep].sort(dim=1).values  # [B, keep]


def select_tokens(scores, keep):
    """Patch numbers of the ``keep`` highest scores of each clip, in ascending order.

    Equal scores (+0 and -0 are equal) go to the lower patch number. NaN ranks above +Inf, as in ``torch.sort``.
    Not differentiable.

    Args:
        scores: float32 ``[B, P]``, any strides.
        keep: how many to keep, 1 to P.

    Returns:
        int64 ``[B, keep]``.

    Raises:
        TypeError: ``scores`` is not float32: half precision makes ties that are not there.
        ValueError: ``scores`` is not two-dimensional, or ``keep`` is out of range.
    """
    return _select_tokens(scores, keep)


def check_selection(scores, keep):
    """Raise unless ``keep`` patches can be selected by these scores."""
    check_shape("scores", scores, "BP")
    check_dtype("scores", scores, (torch.float32,))
    check_keep(keep, scores.shape[1])


def _fake(scores, keep):
    return scores.new_empty((scores.shape[0], keep), dtype=torch.int64)


def _compiled(scores, keep):
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
