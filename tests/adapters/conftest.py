import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pruneattn import ops
from pruneattn.adapters import families
from pruneattn.models.optimize import PackedLinear


@pytest.fixture(scope="session")
def eager(load_file):
    """The eager model next to this file."""
    return load_file(Path(__file__).with_name("eager.py"))


def randomize(model, seed=0):
    """Random weights large enough that attention is far from uniform; the model in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            random = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if parameter.dim() == 1:
                parameter.add_(random, alpha=0.2)
            else:
                parameter.copy_(random if name.endswith(("token", "embed", "embeddings")) else 0.3 * random)
    return model.eval()


@pytest.fixture
def random_weights():
    return randomize


@pytest.fixture
def record_kept(monkeypatch):
    """List to which the kept patches of every pruning block that runs are appended."""
    kept = []

    def recording(prune):
        def run(*arguments):
            out = prune(*arguments)
            kept.append(out[-3])
            return out

        return run

    for name in ("prune_tokens", "cls_prune_tokens", "pruned_attention"):
        monkeypatch.setattr(ops, name, recording(getattr(ops, name)))
    return kept


@pytest.fixture
def entering():
    """``entering(block, run)``: the tokens that enter a block when ``run()`` runs, the state of the random numbers at
    that moment, and the result of ``run()``.
    """

    def capture(block, run):
        seen = SimpleNamespace()

        def note(module, args):
            seen.tokens, seen.random = args[0].detach(), torch.get_rng_state()

        handle = block.register_forward_pre_hook(note)
        try:
            seen.out = run()
        finally:
            handle.remove()
        return seen

    return capture


class PlainAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.num_heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class PlainBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = PlainAttention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PlainViT(nn.Module):
    """Minimal model with timm's names; takes tokens ``[B, N, C]``. It needs no library."""

    num_prefix_tokens = 1

    def __init__(self, dim=24, heads=3, depth=4, block=PlainBlock):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList([block(dim, heads) for _ in range(depth)])

    def forward(self, x):
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def plain():
    """The classes above, to derive faulty models from."""
    return SimpleNamespace(Attention=PlainAttention, Block=PlainBlock, ViT=PlainViT)


@pytest.fixture
def plain_vit():
    return randomize(PlainViT())


@pytest.fixture
def gradients():
    """``gradients(model, run)``: gradients of the sum of the squares of ``run()`` by name of the parameter."""

    def compute(model, run):
        model.zero_grad()
        run().square().sum().backward()
        return {name: copy.copy(p.grad) for name, p in model.named_parameters()}

    return compute


@pytest.fixture
def make_subject(load_file, plain):
    """``make_subject(kind, ...)``: a small model of a family, with its inputs; see ``subjects.py``."""
    known = list(families._families)
    subjects = load_file(Path(__file__).with_name("subjects.py"))
    yield lambda kind, **arguments: subjects.make_subject(kind, randomize, load_file, plain, **arguments)
    families._families[:] = known


@pytest.fixture
def packed():
    """``packed(model)``: names of the packed layers."""
    return lambda model: [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]


@pytest.fixture
def assert_close():
    """``assert_close(given, expected)``: equal up to the rounding of float32."""

    def check(given, expected):
        assert given.shape == expected.shape and given.dtype == expected.dtype
        assert (given - expected).norm() <= 1e-5 * expected.norm()

    return check
