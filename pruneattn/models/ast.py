"""AST: frequency-major patches; the clip's feature is the mean of the CLS and distillation tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .vit import PrunedViT


class AST(PrunedViT):
    """Audio Spectrogram Transformer. :func:`pruneattn.create_model` documents the arguments."""

    time_major = False
    num_extra_tokens = 2
    default_score = "cls"

    def __init__(self, name: str, **arguments: Any) -> None:
        super().__init__(name, **arguments)
        self.dist_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        self.norm = nn.LayerNorm(self.embed_dim, eps=1e-6)
        self.head_norm = nn.LayerNorm(self.embed_dim, eps=1e-5)
        self.head = nn.Linear(self.embed_dim, self.num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.trunc_normal_(self.dist_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def extra_tokens(self) -> Tensor:
        return torch.cat([self.cls_token, self.dist_token], dim=1)

    def forward_head(self, x: Tensor) -> Tensor:
        extra = self.norm(x[:, : self.num_extra_tokens])  # [B, 2, C]
        return self.head(self.head_norm(extra.mean(1)))
