"""The checks of results."""

import pytest
import torch

from bench.harness.guards import WrongResult, check_close, check_same

EXPECTED = torch.tensor([[1.0, -4.0]])


def test_the_tolerance_is_relative_to_the_largest_value():
    check_close("values", EXPECTED + 0.039, EXPECTED, 0.01)
    with pytest.raises(WrongResult, match=r"values differ by 0\.01\d* of the largest value, allowed are 0\.01"):
        check_close("values", EXPECTED + 0.041, EXPECTED, 0.01)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_results_that_are_not_finite_are_wrong(wrong):
    with pytest.raises(WrongResult, match="values differ"):
        check_close("values", torch.tensor([[1.0, wrong]]), EXPECTED, 0.01)


def test_other_shapes_are_wrong():
    with pytest.raises(WrongResult, match=r"values have shape \[2\], not \[1, 2\]"):
        check_close("values", EXPECTED[0], EXPECTED, 0.01)


def test_equal_results_have_no_tolerance():
    check_same("numbers", EXPECTED.clone(), EXPECTED)
    with pytest.raises(WrongResult, match="numbers are not the reference's"):
        check_same("numbers", EXPECTED + 1e-6, EXPECTED)
