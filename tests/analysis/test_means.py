import math

import pytest
import torch

from pruneattn.analysis.means import Means


def test_mean_and_standard_error_of_a_stream():
    values, means = torch.randn(1000, dtype=torch.float64) + 5, Means()
    for part in values.split(37):
        means.add(part, "a")
        means.add(part.float() * 0, ("b", 1))
    mean, se, count = means.of("a")
    assert count == 1000 and mean == pytest.approx(values.mean().item())
    assert se == pytest.approx(values.std().item() / 1000**0.5)
    assert means.of(("b", 1)) == (0.0, 0.0, 1000)


def test_values_that_are_not_finite_are_omitted():
    means = Means()
    means.add(torch.tensor([1.0, math.nan, 3.0, math.inf]), 0)
    assert means.of(0) == (2.0, 1.0, 2)
    assert math.isnan(means.of("never")[0]) and means.of("never")[2] == 0
    means.add(torch.tensor([4.0]), "once")
    assert means.of("once")[0] == 4.0 and math.isnan(means.of("once")[1])
