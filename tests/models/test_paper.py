"""The package against a direct implementation of the paper's method (eager.py), in float64."""

import pytest
import torch

import pruneattn

FAMILIES = ("audiomae", "ast")


def key_norm(q, k, v, extra_tokens):
    return k.norm(dim=-1).mean(1)[:, extra_tokens:]


# Every block is compared in float64; scores are float32 by contract, so their values are compared as such.
SCORES = ("column_mean", "cls", "intensity", "variation", key_norm)


def compare(eager, model, fbank, patches=None):
    kind = {"audiomae": eager.AUDIOMAE, "ast": eager.AST}[model.name.split("_")[0]]
    model.double()
    with torch.no_grad():
        trace = pruneattn.trace(model, fbank, patches)
        logits, kept, scores = eager.run(
            model.state_dict(),
            fbank,
            kind,
            heads=model.num_heads,
            keep_rates=model.keep_rates,
            prune_blocks=model.prune_blocks,
            score=model.score,
            patches=patches,
            stride=model.stride,
        )
        torch.testing.assert_close(model(fbank, patches), logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(trace.logits, logits, rtol=1e-9, atol=1e-9)
    assert len(trace.kept) == len(kept) == len(model.prune_blocks)
    for ours, theirs in zip(trace.kept, kept, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(trace.scores, scores, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=1e-7)
    return trace


# 1024 frames run the same code as 256 on more patches: once per family and score, at the lowest keep-rate.
GRID = [(1.0, 128), (0.7, 128), (0.5, 128), (1.0, 256), (0.7, 256), (0.5, 256)]
GRID.append(pytest.param(0.5, 1024, marks=pytest.mark.slow))


@pytest.mark.parametrize("keep_rate, frames", GRID)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("family", FAMILIES)
def test_same_as_the_paper(eager, make_model, family, score, keep_rate, frames):
    model = make_model(family, frames=frames, keep_rate=keep_rate, score=score)
    trace = compare(eager, model, torch.randn(2, frames, 128, dtype=torch.float64))
    if keep_rate == 0.5:
        assert [kept.shape[1] for kept in trace.kept] == [frames // 4, frames // 8, frames // 16]


# Overlapping patches, different along the two axes, and frames after the last whole patch.
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("stride", "frames", "patches"), [((10, 10), 128, 144), ((7, 13), 101, 17 * 7)])
def test_same_as_the_paper_at_other_strides(eager, make_model, score, stride, frames, patches):
    model = make_model("ast", frames=frames, stride=stride, keep_rate=0.5, score=score)
    trace = compare(eager, model, torch.randn(2, frames, 128, dtype=torch.float64))
    assert trace.scores[0].shape[1] == patches


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("family", FAMILIES)
def test_same_as_the_paper_on_given_patches(eager, make_model, family, score):
    model = make_model(family, keep_rate=0.6, score=score)
    patches = torch.stack([torch.randperm(64)[:37].sort().values for _ in range(3)])
    trace = compare(eager, model, torch.randn(3, 128, 128, dtype=torch.float64), patches)
    assert trace.kept[0].shape == (3, 23)
    assert all(set(kept.tolist()) <= set(given.tolist()) for kept, given in zip(trace.kept[2], patches, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_keep_rate_per_block_and_other_blocks(eager, make_model, family):
    model = make_model(family, depth=5, prune_blocks=(0, 2, 4), keep_rate=(0.9, 1.0, 0.3))
    compare(eager, model, torch.randn(2, 128, 128, dtype=torch.float64))
    model.set_keep_rate((0.4, 0.5, 1.0))
    compare(eager, model, torch.randn(2, 128, 128, dtype=torch.float64))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("family", FAMILIES)
def test_same_gradients_as_the_paper(eager, make_model, family, score):
    model = make_model(family, keep_rate=0.6, score=score, depth=4, prune_blocks=(1, 2)).double()
    kind = {"audiomae": eager.AUDIOMAE, "ast": eager.AST}[family]
    fbank = torch.randn(2, 128, 128, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 5, dtype=torch.float64)
    state = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in model.named_parameters()}
    trained = [name for name, p in state.items() if p.requires_grad]

    loss = (model(fbank) * weights).sum()
    ours = torch.autograd.grad(loss, [fbank, *(p for p in model.parameters() if p.requires_grad)])
    logits, _, _ = eager.run(state, fbank, kind, heads=3, keep_rates=(0.6, 0.6), prune_blocks=(1, 2), score=score)
    theirs = torch.autograd.grad((logits * weights).sum(), [fbank, *(state[name] for name in trained)])
    for name, a, b in zip(["fbank", *trained], ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
