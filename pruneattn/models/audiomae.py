"""AudioMAE: time-major patches, one extra token; the clip's feature is the mean of the remaining patches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..constants import PATCH
from ..errors import UserError
from .patches import check_stride
from .vit import PrunedViT


class AudioMAE(PrunedViT):
    """Encoder of AudioMAE with a classifier. :func:`pruneattn.create_model` documents the arguments."""

    time_major = True
    num_extra_tokens = 1
    default_score = "column_mean"

    def __init__(self, name: str, **arguments: Any) -> None:
        if check_stride(arguments["stride"]) != (PATCH, PATCH):
            raise UserError(
                f"stride: {name} has a patch every {PATCH} mel bins and frames, got {arguments['stride']}; use an AST "
                "for other strides"
            )
        super().__init__(name, **arguments)
        self.fc_norm = nn.LayerNorm(self.embed_dim, eps=1e-6)
        self.head = nn.Linear(self.embed_dim, self.num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        # Never trained. Pretrained weights replace it with their own table, which belongs to another grid.
        self.pos_embed.requires_grad_(False)
        with torch.no_grad():
            self.pos_embed[0, 0] = 0
            time, mel = self.patch_position(torch.arange(self.num_patches))
            self.pos_embed[0, 1:] = sincos_positions(time, mel, self.embed_dim)

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(self.fc_norm(x[:, self.num_extra_tokens :].mean(1)))


def sincos_positions(time: Tensor, mel: Tensor, dim: int) -> Tensor:
    """Sine-cosine position table.

    The frequencies fall from 1 to 1/64 radian per patch, where 64 is the longest side of a grid. The mean over the
    positions is subtracted: it says nothing about position, and it would dominate the tokens of a model with random
    weights.

    Args:
        time, mel: positions ``[P]``: time columns and mel rows.
        dim: channels, a multiple of 4. Each axis gets half of them.

    Returns:
        float64 ``[P, dim]``.

    Raises:
        UserError: ``dim`` is not a multiple of 4.
    """
    if dim % 4:
        raise UserError(f"embed_dim: a sine-cosine position table needs a multiple of 4, got {dim}")
    rates = 64.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = [axis.double().unsqueeze(1) * rates for axis in (time, mel)]  # [P, dim / 4] each
    table = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
    return table - table.mean(0)
