"""Predictors: estimate the transformer's output at a skipped step from features cached at computed steps.

A predictor combines the features of the last computed steps linearly. The feature is either the residual of the blocks
(then the step still embeds its latents and projects the sum, as in LeMiCa) or the velocity itself (then the step runs
no part of the transformer). The weights depend on the noise levels alone, or were fitted during calibration.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

FeatureKind = Literal["residual", "velocity"]


@dataclass(frozen=True)
class CachedFeature:
    """The feature of one computed step."""

    sigma: float
    """The step's noise level."""
    value: "Tensor"
    """``[B, noisy tokens, width]``."""


class Predictor(Protocol):
    """Predicts the feature of a skipped step."""

    @property
    def name(self) -> str:
        """The predictor's name in requests, schedules and on the command line."""

    @property
    def feature(self) -> FeatureKind:
        """The feature that is cached and predicted."""

    @property
    def num_past(self) -> int:
        """The most cached features it uses; at the start of a run it must accept fewer."""

    def predict(self, past: Sequence[CachedFeature], step: int, sigma: float) -> "Tensor":
        """Predict the feature of a skipped step.

        Args:
            past: features of the last computed steps, oldest first; at least one.
            step: the skipped step.
            sigma: its noise level.

        Returns:
            ``[B, noisy tokens, width]``.
        """


@dataclass(frozen=True)
class Reuse:
    """Reuses the last feature unchanged (LeMiCa)."""

    name: str = "reuse"
    feature: FeatureKind = "residual"
    num_past: int = 1

    def predict(self, past: Sequence[CachedFeature], step: int, sigma: float) -> "Tensor":
        del step, sigma
        return past[-1].value


@dataclass(frozen=True)
class Linear:
    """Extrapolates the last two features linearly over sigma; ``damping`` scales the slope, 0 is plain reuse."""

    name: str = "linear"
    feature: FeatureKind = "residual"
    damping: float = 1.0
    num_past: int = 2

    def predict(self, past: Sequence[CachedFeature], step: int, sigma: float) -> "Tensor":
        del step
        if len(past) == 1:
            return past[-1].value
        before, last = past[-2], past[-1]
        slope = (sigma - last.sigma) / (last.sigma - before.sigma)
        return last.value + self.damping * slope * (last.value - before.value)


@dataclass(frozen=True)
class Fitted:
    """A weighted sum of the last features, with weights fitted for each skipped step by least squares."""

    weights: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    """Weights by step, the newest feature's first."""
    name: str = "fitted"
    feature: FeatureKind = "residual"
    num_past: int = 3

    def predict(self, past: Sequence[CachedFeature], step: int, sigma: float) -> "Tensor":
        del sigma
        newest_first = list(reversed(past))
        weights = self.weights[step]
        total = newest_first[0].value * weights[0]
        for weight, feature in zip(weights[1:], newest_first[1:], strict=False):
            total = total + feature.value * weight
        return total


PREDICTORS: Mapping[str, Predictor] = {
    predictor.name: predictor
    for predictor in (
        Reuse(),
        Linear(),
        Linear("damped", damping=0.5),
        Linear("velocity", feature="velocity"),
        Fitted(),
    )
}
"""Predictors by name. ``fitted`` has no weights here; they are part of a schedule."""


def predictor_to_json(predictor: Predictor) -> dict[str, Any]:
    if isinstance(predictor, Fitted):
        return {"name": predictor.name, "weights": {str(step): list(w) for step, w in predictor.weights.items()}}
    return {"name": predictor.name}


def predictor_from_json(data: Mapping[str, Any]) -> Predictor:
    """Restore what ``predictor_to_json`` returned.

    Raises:
        KeyError: the name is unknown, or the weights are missing.
    """
    if data["name"] == "fitted":
        return Fitted({int(step): tuple(map(float, weights)) for step, weights in data["weights"].items()})
    return PREDICTORS[data["name"]]
