"""What the ops hand to the CUDA kernels: their CUDA functions on CPU tensors, with the kernels under the shim."""

import sys

import pytest
import torch

import pruneattn.ops  # noqa: F401
from pruneattn import backend

MODULES = ("cls_scores", "gather_tokens", "prune_epilogue", "prune_tokens", "select_tokens")


@pytest.fixture
def launched(shim_module, monkeypatch):
    """The names of the kernels that were launched."""
    names = []

    def launch(kernel, tensor, *args):
        names.append(kernel)
        getattr(shim_module, f"cuda_{kernel}")(*args, 0, 0)

    for name in MODULES:
        monkeypatch.setattr(sys.modules[f"pruneattn.ops.{name}"], "launch", launch)
        monkeypatch.setattr(sys.modules[f"pruneattn.ops.{name}"], "_C", shim_module)
    functions = backend._kernels["prune_epilogue"]
    monkeypatch.setattr(sys.modules["pruneattn.ops.cls_prune_tokens"], "choose", lambda op, device: functions["cuda"])
    return names


def check(name, *args):
    """The op's CUDA function gives what its reference gives."""
    functions = backend._kernels[name]
    ours, expected = functions["cuda"](*args), functions["reference"](*args)
    for one, other in zip(*((t,) if torch.is_tensor(t) else t for t in (ours, expected)), strict=True):
        assert one.is_contiguous()
        torch.testing.assert_close(one, other, rtol=2e-5, atol=1e-7)


def tokens_of(batch, tokens):
    return torch.randn(batch, tokens, 12), torch.randn(batch, tokens, 5, dtype=torch.bfloat16)[:, :, ::2]


def test_select_and_gather(launched):
    scores, (x, y) = torch.randn(2, 40), tokens_of(2, 42)
    check("select_tokens", scores[:, ::2], 7)
    check("gather_tokens", x, torch.tensor([[0, 3], [39, 5]]), 2)
    check("prune_tokens", scores, x, y, 30, 2)
    assert launched == ["select_tokens", "gather_tokens", "prune_tokens"]


@pytest.mark.parametrize("rows", [1, 12])
def test_prune_epilogue(launched, rows):
    x, y = tokens_of(2, 71)
    check("prune_epilogue", torch.rand(2, rows, 70), x, y, 33, 1)
    check("prune_epilogue", torch.rand(4, 2 * rows, 90)[1:3, ::2, 20:], x, y, 70, 1)
    check("prune_epilogue", torch.rand(2, rows, 140)[:, :, ::2], x, y, 1, 1)
    assert launched == ["prune_epilogue"] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cls_scores(launched, dtype):
    packed = torch.randn(2, 66, 3, 4, 16).to(dtype)  # [B, N, 3, H, D]
    q, k, _ = packed.permute(2, 0, 3, 1, 4).unbind(0)
    for scale in (None, -0.3):
        check("cls_scores", q[:, :, 0], k, 2, scale)
        check("cls_prune_tokens", q[:, :, 0], k, *tokens_of(2, 66), 20, 2, scale)
    check("cls_scores", q[:, :, 0, ::2], k[..., ::2], 0)
    assert launched == ["cls_scores", "cls_scores", "prune_epilogue"] * 2 + ["cls_scores"]


def test_what_the_kernels_do_not_take_runs_the_reference(launched):
    q, x = torch.randn(2, 2, 9, 4), tokens_of(2, 9)
    check("cls_scores", q[:, :, 0].double(), q.double(), 1)
    check("cls_prune_tokens", q[:, :, 0].double(), q.double(), *x, 3, 1)
    assert launched == ["prune_epilogue"]
    long = torch.randn(1, 1, 5000, 4)
    check("cls_scores", long[:, :, 0], long, 1)
    check("cls_prune_tokens", long[:, :, 0], long, *tokens_of(1, 5000), 3, 1)
    check("prune_epilogue", torch.randn(1, 2, 5000), *tokens_of(1, 5000), 3, 0)
    assert launched == ["prune_epilogue"]
