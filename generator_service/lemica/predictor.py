"""What stands in for the transformer at a reused step: predictions from what it left at computed ones.

A predictor combines the *features* of the last computed steps linearly. A feature is either the residual of the blocks
(then the step still embeds its latents and projects, LeMiCa's reuse) or the velocity itself (then the step calls no
part of the transformer). The weights are functions of the noise levels alone, or were fitted at calibration.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

FeatureKind = Literal["residual", "velocity"]


@dataclass(frozen=True)
class CachedFeature:
    """What one computed step left."""

    sigma: float
    """Its noise level."""
    value: "Tensor"
    """The feature, ``[B, noisy tokens, width]``."""


class Predictor(Protocol):
    """Predicts a trace."""

    @property
    def name(self) -> str:
        """As requests, schedules and the command line call it."""

    @property
    def feature(self) -> FeatureKind:
        """What is predicted."""

    @property
    def num_past(self) -> int:
        """How many cached features it can use; it must do with fewer at the start of a run."""

    def predict(self, past: Sequence[CachedFeature], step: int, sigma: float) -> "Tensor":
        """The feature at ``step``, whose noise level is ``sigma``; ``past`` are the cached features, oldest first."""


@dataclass(frozen=True)
class Reuse:
    """The last feature as it is (LeMiCa)."""

    name: str = "reuse"
    feature: FeatureKind = "residual"
    num_past: int = 1

    def predict(self, past: Sequence[CachedFeature], step: int, sigma: float) -> "Tensor":
        """The last feature."""
        del step, sigma
        return past[-1].value


@dataclass(frozen=True)
class Linear:
    """The line through the last two features, over sigma; ``damping`` 1 follows it wholly, 0 is plain reuse."""

    name: str = "linear"
    feature: FeatureKind = "residual"
    damping: float = 1.0
    num_past: int = 2

    def predict(self, past: Sequence[CachedFeature], step: int, sigma: float) -> "Tensor":
        """The line's value at ``sigma``, or the last feature while there is only one."""
        del step
        if len(past) == 1:
            return past[-1].value
        before, last = past[-2], past[-1]
        slope = (sigma - last.sigma) / (last.sigma - before.sigma)
        return last.value + self.damping * slope * (last.value - before.value)


@dataclass(frozen=True)
class Fitted:
    """For every reused step its own weights of the last features, by least squares over the calibration samples."""

    weights: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    """Step to weights, newest feature first."""
    name: str = "fitted"
    feature: FeatureKind = "residual"
    num_past: int = 3

    def predict(self, past: Sequence[CachedFeature], step: int, sigma: float) -> "Tensor":
        """The weighted sum."""
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
"""By name. ``fitted`` has no weights yet: a schedule brings them."""


def predictor_to_json(predictor: Predictor) -> dict[str, Any]:
    """What ``predictor_from_json`` needs."""
    if isinstance(predictor, Fitted):
        return {"name": predictor.name, "weights": {str(step): list(w) for step, w in predictor.weights.items()}}
    return {"name": predictor.name}


def predictor_from_json(data: Mapping[str, Any]) -> Predictor:
    """The predictor that was saved.

    Raises:
        KeyError: there is none of that name.
    """
    if data["name"] == "fitted":
        return Fitted({int(step): tuple(map(float, weights)) for step, weights in data["weights"].items()})
    return PREDICTORS[data["name"]]
