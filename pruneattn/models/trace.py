"""What a pruned model keeps."""

from typing import NamedTuple

import torch

from .vit import own_model


class Trace(NamedTuple):
    """Logits of a batch, and each pruning block's choice.

    Attributes:
        logits: ``[B, num_classes]``.
        kept: per pruning block int64 ``[B, k_i]``: numbers of the input patches that it kept, ascending, in the
            model's own token order (``model.patch_position`` says where they lie).
        scores: per pruning block float32 ``[B, n_i]``: score of each patch that entered it, in the order of those
            patches, that is of the block before's ``kept``.
    """

    logits: torch.Tensor
    kept: list
    scores: list


def trace(model, fbank, patches=None):
    """Run a pruned model and note which patches each pruning block keeps and why.

    The arguments are those of a model of :func:`~pruneattn.create_model`. A block whose keep-rate is 1 is scored too. Gradients and dropped paths are as
    in a plain forward: put the model in ``eval()`` for repeatable answers.
    """
    model = own_model(model, "trace")
    record = []
    logits = model.forward_head(model.forward_features(fbank, patches, record))
    numbers = patches
    if patches is None:
        numbers = torch.arange(model.num_patches, device=fbank.device).expand(fbank.shape[0], -1)  # [B, P]
    kept = []
    for index, _ in record:
        numbers = numbers.gather(1, index)  # [B, k_i]
        kept.append(numbers)
    return Trace(logits, kept, [scores.float() for _, scores in record])
