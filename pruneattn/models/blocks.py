"""The parts of the vision transformer, and the block that prunes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..constants import PATCH
from ..errors import UserError
from .heads import MultiHead
from .scores import Pruning

MLP_RATIO = 4
#: Blocks that prune by default, counted from 0: the paper's choice for 12 blocks.
PRUNE_BLOCKS = (3, 6, 9)


def kept_patches(patches: int, keep_rate: float) -> int:
    """``ceil(keep_rate * patches)``, at least 1. Floating-point noise does not round a whole product up."""
    return max(1, math.ceil(keep_rate * patches - 1e-6))


def spread_keep_rate(keep_rate: float | Sequence[float], blocks: int) -> tuple[float, ...]:
    """Convert one keep-rate, or one per pruning block, to a tuple with one float in (0, 1] per pruning block.

    Args:
        keep_rate: a number or a sequence of numbers.
        blocks: number of pruning blocks.

    Raises:
        UserError: a value is out of range, or the number of values does not match the number of blocks.
    """
    given: Any = keep_rate
    try:
        rates = [given] * max(1, blocks) if isinstance(given, Real) else list(given)
    except TypeError as error:
        raise UserError(f"keep_rate: expected a number or one per pruning block, got {keep_rate!r}") from error
    for rate in rates:
        if not isinstance(rate, Real) or not 0 < float(rate) <= 1:
            raise UserError(f"keep_rate: must be above 0 and at most 1, got {rate!r}")
    if blocks == 0 and any(rate < 1 for rate in rates):
        raise UserError(f"keep_rate: {keep_rate} needs pruning blocks, and prune_blocks is empty")
    if blocks and len(rates) != blocks:
        raise UserError(f"keep_rate: {len(rates)} values for {blocks} pruning blocks")
    return tuple(map(float, rates[:blocks]))


def check_prune_blocks(prune_blocks: Iterable[int], depth: int) -> tuple[int, ...]:
    """Check the numbers of the blocks that prune, and return them as a tuple.

    Args:
        prune_blocks: numbers of blocks from 0, ascending.
        depth: number of blocks of the model.

    Raises:
        UserError: the numbers are not of this form; the message names ``prune_blocks``.
    """
    try:
        prune_blocks = tuple(prune_blocks)
    except TypeError as error:
        raise UserError(f"prune_blocks: expected numbers of blocks, such as (3, 6, 9), got {prune_blocks!r}") from error
    if not all(isinstance(i, int) and 0 <= i < depth for i in prune_blocks):
        raise UserError(f"prune_blocks: {prune_blocks} must be within depth {depth} (blocks 0 to {depth - 1})")
    if list(prune_blocks) != sorted(set(prune_blocks)):
        raise UserError(f"prune_blocks: must ascend without repeats, got {prune_blocks}")
    return prune_blocks


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention ``[B, H, rows of q, D]`` by the fastest kernel, or by plain PyTorch if that trains faster."""
    if q.requires_grad and q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # PyTorch's fused kernel takes 2 to 5 times as long here, forward and backward (257 and 65 tokens). Plain
        # PyTorch keeps the softmax matrix for the backward pass, which our kernel would recompute.
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
    return ops.attention(q, k, v)


#: A layer norm, which packed layers may fuse.
Norm: TypeAlias = Callable[[Tensor], Tensor]


class LinearLayer(Protocol):
    """Interface of a block's linear layers: :class:`Linear`, or a packed form of ``packed.py``."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def gelu(self, x: Tensor, norm: Norm | None = None) -> Tensor:
        """GELU of the layer's output for ``x``, or for ``norm(x)``."""
        ...

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """The layer's output plus ``residual``."""
        ...


class PartialProjection(Protocol):
    """Interface of the projection to queries, keys and values: :class:`QKV`, or its packed form."""

    def project(self, x: Tensor, parts: str, norm: Norm | None = None) -> list[Tensor]:
        """Packed projections ``[B, N, .. * C]``, in order, that together hold ``parts``, for example "qkv" or "kv".

        They are those of ``x``, or of ``norm(x)``.
        """
        ...


class Linear(nn.Linear):
    """A linear layer and the steps around it. The packed layers of ``packed.py`` fuse them."""

    def gelu(self, x: Tensor, norm: Norm | None = None) -> Tensor:
        return F.gelu(self(x if norm is None else norm(x)))

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + self(x)


class QKV(Linear):
    """The projection to queries, keys and values, or to some of them."""

    def project(self, x: Tensor, parts: str, norm: Norm | None = None) -> list[Tensor]:
        x = x if norm is None else norm(x)
        if parts == "qkv":
            return [self(x)]
        start, dim = "qkv".index(parts), self.in_features
        rows = slice(start * dim, (start + len(parts)) * dim)
        return [F.linear(x, self.weight[rows], self.bias[rows])]


class DropPath(nn.Module):
    """Stochastic depth: drops the branch for a random fraction ``rate`` of the clips; scales it up for other clips."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        return x * x.new_empty(x.shape[0], 1, 1).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


class Attention(MultiHead, nn.Module):
    """Multi-head self-attention whose parts can run on all rows or on some."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.kernel = attention
        self.qkv: PartialProjection = QKV(dim, 3 * dim)
        self.proj: LinearLayer = Linear(dim, dim)

    def project(self, x: Tensor, parts: str, norm: Norm | None = None) -> list[Tensor]:
        return [view for packed in self.qkv.project(x, parts, norm) for view in self.split_heads(packed)]

    def forward(self, x: Tensor, norm: Norm | None = None) -> Tensor:
        """Attention output of all rows of ``x``, or of ``norm(x)``, before the projection, ``[B, N, C]``."""
        return self.attend(*self.project(x, "qkv", norm))


class Mlp(nn.Module):
    """The two linear layers of a block's MLP; the block runs them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1: LinearLayer = Linear(dim, MLP_RATIO * dim)
        self.fc2: LinearLayer = Linear(MLP_RATIO * dim, dim)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, num_heads: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block on the tokens ``x`` ``[B, N, C]``."""
        return self.finish(x, self.attn(x, self.norm1))

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The remaining steps of the block for these rows: projection of the attention output, residual add, MLP."""
        x = self.add(x, self.attn.proj, attended)
        return self.add(x, self.mlp.fc2, self.mlp.fc1.gelu(x, self.norm2))

    def add(self, x: Tensor, linear: LinearLayer, y: Tensor) -> Tensor:
        """``x + linear(y)``, a branch that stochastic depth may drop."""
        if self.training and self.drop_path.rate > 0:
            return x + self.drop_path(linear(y))
        return linear.add(y, x)


class PruningBlock(Block):
    """A block that drops patches between its attention's residual add and its MLP."""

    def __init__(self, dim: int, num_heads: int, drop_path: float, pruning: Pruning, extra_tokens: int) -> None:
        super().__init__(dim, num_heads, drop_path)
        self.pruning = pruning
        self.extra_tokens = extra_tokens

    def forward(  # type: ignore[override]  # PrunedViT knows which blocks prune, and calls them with a keep-rate
        self, x: Tensor, keep_rate: float, values: Tensor | None = None, scored: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Run the block, and keep the fraction ``keep_rate`` of the patches.

        Args:
            x: tokens ``[B, N, C]``.
            keep_rate: in (0, 1].
            values: input statistics of the patches ``[B, N - extra]``, for scores that rank by the input.
            scored: compute the scores even if every patch is kept.

        Returns:
            The kept tokens ``[B, extra + keep, C]``; the positions of the kept patches among the input patches (int64
            ``[B, keep]``, ascending); and the scores ``[B, N - extra]``. The last two are None if every patch is kept
            and ``scored`` is False.
        """
        patches = x.shape[1] - self.extra_tokens
        keep = kept_patches(patches, keep_rate)
        if keep == patches and not scored:
            return super().forward(x), None, None
        index, scores, x, attended = self.pruning(
            self.attn, x, self.norm1(x), keep, self.extra_tokens, values
        )  # x and attended: [B, extra + keep, C]
        return self.finish(x, attended), index, scores


class PatchEmbed(nn.Module):
    """Linear embedding of the patches, which overlap if ``stride`` (vertical, horizontal) is below their size."""

    def __init__(self, dim: int, stride: tuple[int, int]) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, dim, kernel_size=PATCH, stride=stride)

    def forward(self, image: Tensor) -> Tensor:
        """Embed the patches of ``image`` ``[B, 1, height, width]`` as ``[B, P, C]``."""
        image = image.to(self.proj.weight.dtype)
        return self.proj(image).flatten(2).transpose(1, 2)
