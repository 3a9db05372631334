"""AudioMAE: time-major patches, one extra token, mean of the patches left as the clip's feature."""

import torch
from torch import nn

from ..errors import UserError
from .vit import PrunedViT


class AudioMAE(PrunedViT):
    time_major = True
    num_extra_tokens = 1
    default_score = "column_mean"

    def __init__(self, name, **arguments):
        super().__init__(name, **arguments)
        self.fc_norm = nn.LayerNorm(self.embed_dim, eps=1e-6)
        self.head = nn.Linear(self.embed_dim, self.num_classes)
        self.init_weights()

    def init_weights(self):
        super().init_weights()
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        # Never trained. Pre-trained weights bring a table of their own, on another grid, which replaces this one.
        self.pos_embed.requires_grad_(False)
        with torch.no_grad():
            self.pos_embed[0, 0] = 0
            time, mel = self.patch_position(torch.arange(self.num_patches))
            self.pos_embed[0, 1:] = sincos_positions(time, mel, self.embed_dim)

    def forward_head(self, x):
        return self.head(self.fc_norm(x[:, self.num_extra_tokens :].mean(1)))


def sincos_positions(time, mel, dim):
    """Sine-cosine code ``[P, dim]`` of places ``(time, mel)`` ``[P]``: half the channels for each axis.

    Angles go from 1 down to 1/64 a patch, the extent of the largest grid, and the mean over the places is taken out:
    what is the same everywhere tells no place, and drowns what the tokens of fresh weights say.
    """
    if dim % 4:
        raise UserError(f"embed_dim: a sine-cosine position table needs a multiple of 4, got {dim}")
    rates = 64.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = [axis.double().unsqueeze(1) * rates for axis in (time, mel)]  # [P, dim / 4] each
    table = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
    return table - table.mean(0)
