"""The parts of the vision transformer, and the block that prunes."""

import math
from numbers import Real

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from ..constants import PATCH
from ..errors import UserError

MLP_RATIO = 4


def kept_patches(patches, keep_rate):
    """``ceil(keep_rate * patches)``, at least 1. A product that is whole but for float noise is not rounded up."""
    return max(1, math.ceil(keep_rate * patches - 1e-6))


def spread_keep_rate(keep_rate, blocks):
    """A keep-rate for each of so many pruning blocks: tuple of floats in (0, 1], from one number or one per block."""
    try:
        rates = [keep_rate] * max(1, blocks) if isinstance(keep_rate, Real) else list(keep_rate)
    except TypeError as error:
        raise UserError(f"keep_rate: expected a number or one per pruning block, got {keep_rate!r}") from error
    for rate in rates:
        if not isinstance(rate, Real) or not 0 < rate <= 1:
            raise UserError(f"keep_rate: must be above 0 and at most 1, got {rate!r}")
    if blocks == 0 and any(rate < 1 for rate in rates):
        raise UserError(f"keep_rate: {keep_rate} needs pruning blocks, and prune_blocks is empty")
    if blocks and len(rates) != blocks:
        raise UserError(f"keep_rate: {len(rates)} values for {blocks} pruning blocks")
    return tuple(map(float, rates[:blocks]))


def check_prune_blocks(name, prune_blocks, depth):
    """Numbers of blocks, ascending, as a tuple; ``name`` is the argument's, for what is raised if they are none."""
    try:
        prune_blocks = tuple(prune_blocks)
    except TypeError as error:
        raise UserError(f"{name}: expected numbers of blocks, such as (3, 6, 9), got {prune_blocks!r}") from error
    if not all(isinstance(i, int) and 0 <= i < depth for i in prune_blocks):
        raise UserError(f"{name}: {prune_blocks} must lie within depth {depth} (blocks 0 to {depth - 1})")
    if list(prune_blocks) != sorted(set(prune_blocks)):
        raise UserError(f"{name}: must ascend without repeats, got {prune_blocks}")
    return prune_blocks


def attention(q, k, v):
    """Softmax attention ``[B, H, rows of q, D]`` by the fastest kernel, or plainly where that trains faster."""
    if q.requires_grad and q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # Forward and backward of PyTorch's fused kernel take 2 to 5 times as long there (257 and 65 tokens), and this
        # keeps the softmax matrix for the backward pass, which ours would compute again.
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
    return ops.attention(q, k, v)


class Linear(nn.Linear):
    """A linear layer and what follows it in a block; a packed layer (``optimize.py``) does either in one step."""

    def gelu(self, x):
        return F.gelu(self(x))

    def add(self, x, residual):
        return residual + self(x)


class QKV(Linear):
    """The projection to queries, keys and values, or to some of them."""

    def project(self, x, parts):
        """List of packed projections ``[B, N, .. * C]`` that follow one another, of ``parts`` as in "qkv" or "kv"."""
        if parts == "qkv":
            return [self(x)]
        start, dim = "qkv".index(parts), self.in_features
        rows = slice(start * dim, (start + len(parts)) * dim)
        return [F.linear(x, self.weight[rows], self.bias[rows])]


class DropPath(nn.Module):
    """Leaves out the branch of a random share ``rate`` of the clips and scales the others up (stochastic depth)."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        return x * x.new_empty(x.shape[0], 1, 1).bernoulli_(keep).div_(keep)

    def extra_repr(self):
        return f"rate={self.rate:.3f}"


class MultiHead:
    """Rows cut into heads and put together again, around an attention ``kernel(q, k, v)`` of ``num_heads`` heads of
    ``head_dim`` channels.
    """

    def split_heads(self, packed):
        """``[B, N, parts * C]`` to one view ``[B, H, N, D]`` per part."""
        heads = packed.unflatten(-1, (-1, self.num_heads, self.head_dim))  # [B, N, parts, H, D]
        return heads.permute(2, 0, 3, 1, 4).unbind(0)

    @staticmethod
    def merge_heads(x):
        """``[B, H, N, D]`` to ``[B, N, C]``: a view if the heads of a token lie together, as attention leaves them."""
        return x.transpose(1, 2).flatten(2)

    def attend(self, q, k, v):
        """Attention output before the projection, ``[B, rows of q, C]``."""
        return self.merge_heads(self.kernel(q, k, v))


class Attention(MultiHead, nn.Module):
    """Multi-head self-attention whose parts can run on all rows or on some."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.kernel = attention
        self.qkv = QKV(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def project(self, x, parts):
        """Some of ``"q"``, ``"k"``, ``"v"`` (neighbours) for the rows ``x`` alone, one view ``[B, H, N, D]`` each."""
        return [view for packed in self.qkv.project(x, parts) for view in self.split_heads(packed)]

    def forward(self, x):
        """Attention output of all rows before the projection, ``[B, N, C]``."""
        return self.attend(*self.project(x, "qkv"))


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = Linear(dim, MLP_RATIO * dim)
        self.fc2 = Linear(MLP_RATIO * dim, dim)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim, num_heads, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        return self.finish(x, self.attn(self.norm1(x)))

    def finish(self, x, attended):
        """The rest of the block for these rows: projection of the attention output, residual add, MLP."""
        x = self.add(x, self.attn.proj, attended)
        return self.add(x, self.mlp.fc2, self.mlp.fc1.gelu(self.norm2(x)))

    def add(self, x, linear, y):
        """``x + linear(y)``, a branch that stochastic depth may leave out."""
        if self.training and self.drop_path.rate > 0:
            return x + self.drop_path(linear(y))
        return linear.add(y, x)


class PruningBlock(Block):
    """A block that drops patches between its attention's residual add and its MLP."""

    def __init__(self, dim, num_heads, drop_path, pruning, extra_tokens):
        super().__init__(dim, num_heads, drop_path)
        self.pruning = pruning
        self.extra_tokens = extra_tokens

    def forward(self, x, keep_rate, values=None, scored=False):
        """Run the block on the tokens ``x`` ``[B, N, C]``, and keep this share of the patches, in (0, 1].

        ``values`` ``[B, N - extra]`` are the patches' input statistics, for the scores that rank by these. With
        ``scored`` the scores are computed even when every patch stays.

        Returns the tokens left, the kept patches' places among those that came in (int64 ``[B, keep]``, ascending)
        and the scores ``[B, N - extra]``; None for both where every patch stays and no scores were wanted.
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
    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Conv2d(1, dim, kernel_size=PATCH, stride=PATCH)

    def forward(self, image):
        image = image.to(self.proj.weight.dtype)  # [B, 1, height, width]
        return self.proj(image).flatten(2).transpose(1, 2)  # [B, P, C]
