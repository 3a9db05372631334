"""Blocks that pruning does not support."""

import copy

import pytest
import torch
from torch import nn

import pruneattn


@pytest.fixture
def rejects(plain, random_weights):
    """Assert that a model with these blocks is rejected with this message, and that it is not changed."""

    def check(block, message):
        model = random_weights(plain.ViT(block=block))
        before = copy.deepcopy(model)
        with pytest.raises(pruneattn.UserError, match=message):
            pruneattn.prune(model, 0.5, (1, 3))
        assert [type(module) for module in model.modules()] == [type(module) for module in before.modules()]
        assert all(map(torch.equal, model.parameters(), before.parameters()))

    return check


def test_a_missing_part_is_rejected(plain, rejects):
    class Block(plain.Block):
        def __init__(self, dim, heads):
            super().__init__(dim, heads)
            del self.attn.qkv

    rejects(Block, r"blocks\[1\].attn \(PlainAttention\) has no 'qkv': expected qkv, proj, found proj")


def test_a_single_different_block_is_rejected(plain, plain_vit):
    plain_vit.blocks[3].norm3 = nn.LayerNorm(24)
    with pytest.raises(pruneattn.UserError, match=r"blocks\[3\] \(PlainBlock\) has 'norm3'"):
        pruneattn.prune(plain_vit, 0.5, (1, 3))
    assert type(plain_vit.blocks[1]) is plain.Block
    pruneattn.prune(plain_vit, 0.5, (1, 2))  # a block that does not prune may be of any kind


@pytest.mark.parametrize("kind", ["module", "parameter", "buffer"])
def test_an_unknown_part_is_rejected(plain, rejects, kind):
    class Block(plain.Block):
        def __init__(self, dim, heads):
            super().__init__(dim, heads)
            if kind == "module":
                self.attn.position = nn.Linear(dim, dim)
            elif kind == "parameter":
                self.attn.position = nn.Parameter(torch.zeros(dim))
            else:
                self.attn.register_buffer("position", torch.zeros(dim))

    rejects(Block, r"blocks\[1\].attn \(PlainAttention\) has 'position', a part that pruning does not support")


def test_unsupported_shapes_are_rejected(plain, rejects):
    def grouped(dim, heads):
        block = plain.Block(dim, heads)
        block.attn.qkv = nn.Linear(dim, dim + 2 * dim // heads)
        return block

    rejects(grouped, r"blocks\[1\].attn.qkv: expected a linear layer from 24 to 72 channels, found .* from 24 to 40")

    def more_heads(dim, heads):
        block = plain.Block(dim, heads)
        block.attn.num_heads = 5
        return block

    rejects(more_heads, r"blocks\[1\].attn.num_heads: 5 does not divide the 24 channels")

    def no_heads(dim, heads):
        block = plain.Block(dim, heads)
        del block.attn.num_heads
        return block

    rejects(no_heads, r"blocks\[1\].attn.num_heads: expected the number of heads, found None")

    def no_linear(dim, heads):
        block = plain.Block(dim, heads)
        block.attn.proj = nn.Identity()
        return block

    rejects(no_linear, r"blocks\[1\].attn.proj: expected a linear layer")


def test_an_unknown_argument_is_rejected(plain, rejects):
    class Block(plain.Block):
        def forward(self, x, rope=None):
            return super().forward(x)

    rejects(Block, r"blocks\[1\] takes rope in addition to its tokens")


def test_a_replaced_forward_is_rejected(plain, rejects):
    def block(dim, heads):
        block = plain.Block(dim, heads)
        block.forward = lambda x: x
        return block

    rejects(block, r"blocks\[1\].forward was replaced on the object")


def test_a_forward_replaced_later_stops_unprune(plain_vit):
    pruneattn.prune(plain_vit, 0.5, (1,))
    plain_vit.blocks[1].forward = lambda x: x
    with pytest.raises(pruneattn.UserError, match=r"blocks\[1\].forward was replaced"):
        pruneattn.unprune(plain_vit)


def test_parts_that_are_combined_differently_are_rejected(plain, rejects):
    message = r"blocks\[1\] has the parts of a ViT's block, but combines them differently"

    class NormAfter(plain.Block):
        def forward(self, x):
            x = x + self.norm1(self.attn(x))
            return x + self.norm2(self.mlp(x))

    class Parallel(plain.Block):
        def forward(self, x):
            return x + self.attn(self.norm1(x)) + self.mlp(self.norm2(x))

    class NoResidual(plain.Block):
        def forward(self, x):
            x = self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))

    for block in (NormAfter, Parallel, NoResidual):
        rejects(block, message)

    class OtherScale(plain.Block):
        def __init__(self, dim, heads):
            super().__init__(dim, heads)
            self.attn.scale = 1.0

    class Causal(plain.Block):
        def __init__(self, dim, heads):
            super().__init__(dim, heads)
            self.attn = CausalAttention(dim, heads)

    class CausalAttention(plain.Attention):
        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.proj(out.transpose(1, 2).flatten(2))

    class HeadsInside(plain.Block):
        def __init__(self, dim, heads):
            super().__init__(dim, heads)
            self.attn = HeadsInsideAttention(dim, heads)

    class HeadsInsideAttention(plain.Attention):
        def forward(self, x):  # query, key, value of a head are adjacent
            q, k, v = self.qkv(x).unflatten(-1, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)
            out = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.proj(out.transpose(1, 2).flatten(2))

    for block in (OtherScale, Causal, HeadsInside):
        rejects(block, message)


def test_weights_that_hide_a_difference_are_not_used(plain, random_weights):
    """Some models set the last layers of their branches to zero at the start of training."""

    class NormAfter(plain.Block):
        def forward(self, x):
            x = x + self.norm1(self.attn(x))
            return x + self.norm2(self.mlp(x))

    model = plain.ViT(block=NormAfter)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    with pytest.raises(pruneattn.UserError, match="combines them differently"):
        pruneattn.prune(model, 0.5, (1,))


def test_a_block_that_cannot_run_alone_is_rejected(plain, rejects):
    class Block(plain.Block):
        def forward(self, x):
            return super().forward(x.reshape(1, 3, 3, 24).flatten(1, 2))

    rejects(Block, r"blocks\[1\]: a copy of the block could not be run alone")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype(plain_vit, dtype):
    pruneattn.prune(plain_vit.to(dtype), 0.5, (1, 3))
    assert plain_vit(torch.randn(2, 10, 24).to(dtype)).shape == (2, 1 + 3, 24)


def test_checks_do_not_change_the_block(plain_vit):
    plain_vit.train()
    plain_vit.blocks[1].norm1.eval()
    modes = [module.training for module in plain_vit.modules()]
    before = copy.deepcopy(plain_vit.state_dict())
    calls = []
    for module in plain_vit.blocks[1].modules():
        module.register_forward_pre_hook(lambda *_: calls.append(1))
        module.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    pruneattn.prune(plain_vit, 0.5, (1,))
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in plain_vit.modules()] == modes
    assert all(map(torch.equal, plain_vit.state_dict().values(), before.values()))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in plain_vit.parameters())
    assert not calls
