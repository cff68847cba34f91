"""Predictors, compared with the formulas they implement."""

import pytest
import torch

from generator_service.lemica import PREDICTORS, Fitted, Linear, Reuse
from generator_service.lemica.predictor import CachedFeature

FIRST = CachedFeature(0.9, torch.tensor([1.0, 2.0]))
SECOND = CachedFeature(0.7, torch.tensor([3.0, 2.0]))


def test_reuse_returns_the_newest_feature() -> None:
    """Reuse does not depend on noise levels."""
    assert Reuse().predict([FIRST, SECOND], 5, 0.1) is SECOND.value


@pytest.mark.parametrize(("damping", "expected"), [(1.0, [5.0, 2.0]), (0.5, [4.0, 2.0]), (0.0, [3.0, 2.0])])
def test_linear_extrapolation_of_two_features(damping: float, expected: list[float]) -> None:
    """The last change is extrapolated in proportion to the distance, and damped."""
    predicted = Linear("line", damping=damping).predict([FIRST, SECOND], 5, 0.5)
    assert torch.allclose(predicted, torch.tensor(expected))


def test_linear_with_one_feature_is_reuse() -> None:
    """After a single computed step there is nothing to extrapolate."""
    assert Linear().predict([FIRST], 1, 0.5) is FIRST.value


def test_fitted_weights_belong_to_steps() -> None:
    """Each step has its own weights, starting with that of the newest feature."""
    predictor = Fitted({5: (2.0, -1.0), 6: (1.0, 1.0)})
    assert predictor.predict([FIRST, SECOND], 5, 0.5).tolist() == [5.0, 2.0]
    assert predictor.predict([FIRST, SECOND], 6, 0.4).tolist() == [4.0, 4.0]


def test_names_are_unique() -> None:
    """A predictor is looked up by its name."""
    assert all(name == predictor.name for name, predictor in PREDICTORS.items())
    assert set(PREDICTORS) == {"reuse", "linear", "damped", "velocity", "fitted"}
