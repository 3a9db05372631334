"""Keep-rates of models of this package and of models that `prune` changed, set permanently or within a block."""

import copy

import pytest
import torch

import pruneattn
from pruneattn import UserError, at_keep_rate


@pytest.fixture
def own():
    sizes = {"frames": 64, "embed_dim": 24, "num_heads": 3, "depth": 4, "num_classes": 5}
    return pruneattn.create_model("ast_tiny", prune_blocks=(1, 2), keep_rate=(0.5, 0.25), **sizes).eval()


@pytest.fixture
def pruned(plain_vit):
    return pruneattn.prune(plain_vit, (0.5, 0.25), (1, 2))


@pytest.fixture(params=["own", "pruned", "own, compiled", "pruned, compiled"])
def model(request, own, pruned):
    model = own if "own" in request.param else pruned
    return torch.compile(model, backend="eager") if "compiled" in request.param else model


def rates_of(model):
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, pruneattn.models.PrunedViT):
        return model.keep_rates
    return tuple(block._pruneattn.keep_rate for block in model.blocks[1:3])


def test_set_keep_rate_reaches_the_model(model):
    pruneattn.set_keep_rate(model, 0.7)
    assert rates_of(model) == (0.7, 0.7)
    pruneattn.set_keep_rate(model, (1, 0.3))
    assert rates_of(model) == (1.0, 0.3)


@pytest.mark.parametrize("keep_rate, rates", [(0.7, (0.7, 0.7)), ((1, 0.3), (1.0, 0.3))])
def test_the_rate_applies_inside_and_the_old_rate_after(model, keep_rate, rates):
    with at_keep_rate(model, keep_rate) as inside:
        assert inside is model
        assert rates_of(model) == rates
    assert rates_of(model) == (0.5, 0.25)


def test_the_old_rate_is_restored_after_an_exception(model):
    with pytest.raises(ZeroDivisionError), at_keep_rate(model, 0.7):
        assert rates_of(model) == (0.7, 0.7)
        raise ZeroDivisionError
    assert rates_of(model) == (0.5, 0.25)


def test_nested_rates_are_restored_one_by_one(model):
    with at_keep_rate(model, 0.7):
        with at_keep_rate(model, 0.9):
            assert rates_of(model) == (0.9, 0.9)
        assert rates_of(model) == (0.7, 0.7)
        pruneattn.set_keep_rate(model, 0.1)
    assert rates_of(model) == (0.5, 0.25)


@pytest.mark.parametrize("rate", [0, 1.5, float("nan"), "half", None, (0.5, 0.5, 0.5), (0.5, 0)])
def test_an_invalid_rate_changes_nothing(model, rate):
    with pytest.raises(UserError, match="^keep_rate: "), at_keep_rate(model, rate):
        pytest.fail("entered")
    with pytest.raises(UserError, match="^keep_rate: "):
        pruneattn.set_keep_rate(model, rate)
    assert rates_of(model) == (0.5, 0.25)


def test_a_model_without_pruning_is_named(plain_vit):
    for function in (pruneattn.set_keep_rate, lambda *args: at_keep_rate(*args).__enter__()):
        with pytest.raises(UserError, match="keep_rate: no block of this PlainViT prunes: call pruneattn.prune first"):
            function(plain_vit, 0.5)


@pytest.mark.parametrize("kind", ["own", "pruned"])
def test_outputs_inside_are_those_of_a_model_at_that_rate(request, kind):
    model = request.getfixturevalue(kind)
    x = torch.randn(2, 64, 128) if kind == "own" else torch.randn(2, 10, 24)
    expected = copy.deepcopy(model)
    pruneattn.set_keep_rate(expected, 1.0)
    with torch.no_grad():
        before = model(x)
        with at_keep_rate(model, 1.0):
            assert torch.equal(model(x), expected(x))
        assert torch.equal(model(x), before)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["own", "pruned"])
def test_a_compiled_model_runs_at_the_rate(request, kind):
    torch._dynamo.reset()
    model = request.getfixturevalue(kind)
    x = torch.randn(2, 64, 128) if kind == "own" else torch.randn(2, 10, 24)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        before = compiled(x)
        with at_keep_rate(compiled, 0.9):
            inside = compiled(x)
            torch.testing.assert_close(inside, model(x))
        torch.testing.assert_close(compiled(x), before)
        assert inside.shape != before.shape or not torch.equal(inside, before)


def test_pruning_again_inside_keeps_the_new_rates(pruned):
    with at_keep_rate(pruned, 0.9):
        pruneattn.prune(pruned, 0.6, (1, 2))
    assert rates_of(pruned) == (0.6, 0.6)
    with at_keep_rate(pruned, 0.9):
        pruneattn.unprune(pruned)
    with pytest.raises(UserError, match="no block"):
        pruneattn.set_keep_rate(pruned, 0.5)
