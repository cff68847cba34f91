"""Predictors, against the arithmetic they stand for."""

import pytest
import torch

from generator_service.lemica import PREDICTORS, Fitted, Linear, Reuse
from generator_service.lemica.predictor import CachedFeature

FIRST = CachedFeature(0.9, torch.tensor([1.0, 2.0]))
SECOND = CachedFeature(0.7, torch.tensor([3.0, 2.0]))


def test_reuse_is_the_last() -> None:
    """Plain reuse does not look at noise levels."""
    assert Reuse().predict([FIRST, SECOND], 5, 0.1) is SECOND.value


@pytest.mark.parametrize(("damping", "expected"), [(1.0, [5.0, 2.0]), (0.5, [4.0, 2.0]), (0.0, [3.0, 2.0])])
def test_a_line_through_the_last_two(damping: float, expected: list[float]) -> None:
    """As far beyond the second as the second is from the first, the change repeats, damped."""
    found = Linear("line", damping=damping).predict([FIRST, SECOND], 5, 0.5)
    assert torch.allclose(found, torch.tensor(expected))


def test_a_line_needs_two_points() -> None:
    """After a single computed step there is nothing to extrapolate."""
    assert Linear().predict([FIRST], 1, 0.5) is FIRST.value


def test_fitted_weights_belong_to_steps() -> None:
    """Each step has its own weights, the newest feature's first."""
    predictor = Fitted({5: (2.0, -1.0), 6: (1.0, 1.0)})
    assert predictor.predict([FIRST, SECOND], 5, 0.5).tolist() == [5.0, 2.0]
    assert predictor.predict([FIRST, SECOND], 6, 0.4).tolist() == [4.0, 4.0]


def test_names_are_unique() -> None:
    """A predictor is found by its own name."""
    assert all(name == predictor.name for name, predictor in PREDICTORS.items())
    assert set(PREDICTORS) == {"reuse", "linear", "damped", "velocity", "fitted"}
