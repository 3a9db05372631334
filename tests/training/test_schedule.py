from dataclasses import replace

import pytest

from pruneattn.training.recipes import Recipe
from pruneattn.training.schedule import keep_rate_at, learning_rate, pruning_started


def test_keep_rate_equals_computed_values():
    rates = [keep_rate_at(epoch, 0.5, 30, 20) for epoch in (0, 29, 30, 35, 40, 45, 49, 50, 59)]
    # (1 + cos(pi t)) / 2 at t = 0, 1/4, 1/2, 3/4 is 1, 0.8535534, 0.5, 0.1464466; at t = 19/20 it is 0.00615583.
    assert rates == pytest.approx([1, 1, 1, 0.9267767, 0.75, 0.5732233, 0.5030779, 0.5, 0.5], abs=1e-7)
    assert rates[-2:] == [0.5, 0.5] and rates[:3] == [1.0, 1.0, 1.0]


def test_keep_rate_between_epochs_immediate_and_constant():
    assert keep_rate_at(32.5, 0.6, 30, 10) == pytest.approx(0.6 + 0.4 * 0.8535534)
    assert [keep_rate_at(epoch, 0.7, 3, 0) for epoch in (2, 3, 4)] == [1.0, 0.7, 0.7]
    assert {keep_rate_at(epoch, 1.0, 3, 4) for epoch in range(10)} == {1.0}


def test_pruning_starts_only_where_a_target_is_below_one():
    assert [pruning_started(epoch, (0.5,), 5) for epoch in (4, 5, 6)] == [False, True, True]
    assert not pruning_started(9, (1.0,), 5)
    assert pruning_started(9, (1.0, 0.9, 1.0), 5)


def test_cosine_equals_computed_values():
    recipe = replace(
        Recipe(), epochs=10, warmup_epochs=2.0, warmup_steps=0, lr=1e-3, lr_batch=256, batch_size=64, min_lr=1e-5
    )
    peak = 2.5e-4
    assert learning_rate(0, recipe, 5) == pytest.approx(peak / 10)
    assert learning_rate(4, recipe, 5) == pytest.approx(peak / 2)
    assert learning_rate(9, recipe, 5) == pytest.approx(peak)
    assert learning_rate(29, recipe, 5) == pytest.approx((peak + 1e-5) / 2)  # half of the 40 steps after the warm-up
    assert learning_rate(49, recipe, 5) == pytest.approx(1e-5)
    rates = [learning_rate(step, recipe, 5) for step in range(9, 50)]
    assert rates == sorted(rates, reverse=True)


def test_steps_equal_computed_values():
    recipe = replace(
        Recipe(),
        schedule="step",
        epochs=30,
        warmup_epochs=0.0,
        warmup_steps=100,
        lr=1e-4,
        lr_batch=64,
        batch_size=64,
        lr_step_first=10,
        lr_step_every=5,
        lr_step_factor=0.5,
    )
    at = {epoch: learning_rate(epoch * 40, recipe, 40) for epoch in range(30)}
    assert learning_rate(0, recipe, 40) == pytest.approx(1e-6)
    assert learning_rate(49, recipe, 40) == pytest.approx(5e-5)
    rates = [at[epoch] for epoch in (3, 9, 10, 14, 15, 20, 29)]
    assert rates == pytest.approx([1e-4, 1e-4, 5e-5, 5e-5, 2.5e-5, 1.25e-5, 6.25e-6])
    every = replace(recipe, warmup_steps=0, lr_step_first=5, lr_step_every=1, lr_step_factor=0.85)
    rates = [learning_rate(epoch * 40 + 39, every, 40) for epoch in (4, 5, 7)]
    assert rates == pytest.approx([1e-4, 8.5e-5, 6.14125e-5])
