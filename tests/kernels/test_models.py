"""Whole models with the Triton kernels: the results of the reference, training, one graph, export."""

import copy
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import pruneattn
from pruneattn.ops.backend import DEVICES, use_backend, why_not

MODELS = ("audiomae_tiny", "ast_tiny")
DEVICE = DEVICES["triton"]

pytestmark = pytest.mark.device if DEVICE == "cuda" else pytest.mark.interpreted


@pytest.fixture(autouse=True)
def triton():
    if why_not("triton"):
        pytest.skip(why_not("triton"))
    torch.manual_seed(0)
    with use_backend("triton"):
        yield


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that have run."""
    from pruneattn.kernels.launch import Launch

    names, run = set(), Launch.run
    monkeypatch.setattr(Launch, "run", lambda self, tensor: (names.add(self.kernel.fn.__name__), run(self, tensor))[1])
    return names


def make(name, frames=64):
    """A model of two pruning blocks, and two inputs."""
    model = pruneattn.create_model(
        name, num_classes=4, frames=frames, keep_rate=0.5, depth=2, embed_dim=32, num_heads=2, prune_blocks=(0, 1)
    )
    return model.to(DEVICE), torch.randn(2, frames, 128, device=DEVICE)


def step(model, fbank, amp=torch.float32, call=None):
    """Loss and gradients of the model, or of another function that calls it."""
    model.zero_grad()
    with torch.autocast(DEVICE, amp, enabled=amp != torch.float32):
        loss = (model if call is None else call)(fbank).float().square().mean()
    loss.backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in trained.items()}


def assert_same(ours, expected, tolerance):
    torch.testing.assert_close(ours[0], expected[0], rtol=tolerance, atol=tolerance)
    for name, grad in ours[1].items():
        worst = (grad - expected[1][name]).abs().max()
        assert worst <= tolerance * expected[1][name].abs().max() + 1e-7, name


@pytest.mark.parametrize("name", MODELS)
def test_forward_and_backward_match_the_reference(name, launched):
    model, fbank = make(name)
    ours, kept = step(model, fbank), pruneattn.trace(model, fbank).kept
    score = "_column_sums" if name == "audiomae_tiny" else "_cls_weights"
    assert launched == {"_attention", score, "_grad_queries", "_grad_keys"}
    with use_backend("reference"):
        expected, expected_kept = step(model, fbank), pruneattn.trace(model, fbank).kept
    assert all(torch.equal(a, b) for a, b in zip(kept, expected_kept, strict=True))
    assert_same(ours, expected, 2e-4)


def test_autocast_and_gradient_checkpointing():
    model, fbank = make("audiomae_tiny")
    plain = step(model, fbank, torch.bfloat16)
    saving = copy.deepcopy(model)
    for block in saving.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    assert_same(step(saving, fbank, torch.bfloat16), plain, 0.0)  # the same bits: every sum has a fixed order
    assert_same(plain, step(model, fbank), 0.1)


@pytest.mark.parametrize("name", MODELS)
def test_compiled_in_one_graph(name):
    torch.compiler.reset()
    model, fbank = make(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(step(model, fbank, call=compiled), step(model, fbank), 1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_exported(name):
    model, fbank = make(name)
    batch = torch.export.Dim("batch", min=1, max=16)
    program = torch.export.export(model.eval(), (fbank,), dynamic_shapes=({0: batch},))
    with torch.no_grad():
        more = torch.cat([fbank, fbank[:1]])
        torch.testing.assert_close(program.module()(more), model(more))


def test_a_forced_kernel_runs_in_a_compiled_attention(launched):
    torch.compiler.reset()
    q, k, v = torch.randn(3, 1, 2, 9, 16, device=DEVICE).unbind(0)
    attend = torch.compile(pruneattn.ops.attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(attend(q, k, v), torch.nn.functional.scaled_dot_product_attention(q, k, v))
    assert launched == {"_attention"}


def test_pytorchs_attention_is_traced_on_other_devices():
    """In one graph, on a device without our kernels."""
    torch.compiler.reset()
    q = torch.empty(1, 2, 9, 16, device="meta")
    attend = torch.compile(pruneattn.ops.attention, fullgraph=True, backend="aot_eager")
    assert attend(q, q, q).shape == q.shape
    program = torch.export.export(Attend(), (q, q, q))
    assert "scaled_dot_product_attention" in str(program.graph)


class Attend(torch.nn.Module):
    def forward(self, q, k, v):
        return pruneattn.ops.attention(q, k, v)
