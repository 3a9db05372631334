"""Attention heads: the rows of a projection are split into heads and merged again."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class MultiHead:
    """Base class of multi-head attention, here and in the adapters: the interface for a :class:`~pruneattn.Pruning`.

    Attributes:
        num_heads: heads, H.
        head_dim: channels of a head, D.
        kernel: function ``(q, k, v)`` of ``[B, H, N, D]`` each that returns the attention output ``[B, H, N, D]``.
    """

    num_heads: int
    head_dim: int
    kernel: Callable[[Tensor, Tensor, Tensor], Tensor]

    def project(self, x: Tensor, parts: str) -> list[Tensor]:
        """Project the rows ``x`` ``[B, M, C]`` only.

        Args:
            x: normalized tokens.
            parts: neighboring letters of "qkv".

        Returns:
            A view ``[B, H, M, D]`` for each letter of ``parts``.
        """
        raise NotImplementedError

    def split_heads(self, packed: Tensor) -> tuple[Tensor, ...]:
        """Split ``[B, N, parts * C]`` into one view ``[B, H, N, D]`` per part."""
        heads = packed.unflatten(-1, (-1, self.num_heads, self.head_dim))  # [B, N, parts, H, D]
        return heads.permute(2, 0, 3, 1, 4).unbind(0)

    @staticmethod
    def merge_heads(x: Tensor) -> Tensor:
        """Merge ``[B, H, N, D]`` into ``[B, N, C]``: a view if the heads of a token are adjacent in memory, which is
        the layout that attention returns.
        """
        return x.transpose(1, 2).flatten(2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention output before the projection, ``[B, rows of q, C]``."""
        return self.merge_heads(self.kernel(q, k, v))
