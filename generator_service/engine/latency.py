"""Estimates the time of an image from its number of tokens and of computed and reused steps.

The time of a run is ``pace * (computed + share * reused)``. The share is a property of the model and its predictor, and
is learned from many runs. The pace is that of the device now, and follows the last runs. One slow image therefore
changes neither the ratio of the modes nor, alone, the pace.
"""

import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from generator_service.lemica import Schedule

REUSED_SHARE = 0.05
"""Assumed time of a reused step relative to a computed one, until measurements replace it."""
PRIOR_WEIGHT = 0.1
"""Weight of this assumption, relative to that of a pair of runs."""
SHARES = np.geomspace(0.002, 1.0, 200)
"""Shares to choose from."""
NUM_RUNS = 40
"""Runs of one size that the share is learned from."""
NUM_PACES = 3
"""Runs that the pace is the median of, so that it follows a change after two of them."""
MAX_PACE_STEPS = 6.0
"""Runs with more computed steps do not count more for the pace; the short ones of the warm-up count less."""
NUM_DECODES = 8
MAX_BATCH_EXPONENT = 1.2


@dataclass(frozen=True)
class LatencyEstimate:
    """Estimated times of an image of one size, in seconds."""

    computed_step_s: float
    reused_step_s: float
    decode_s: float
    batch_exponent: float = 1.0
    """A step of n images takes n to the power of this times as long as that of one."""

    def denoise_s(self, num_computed: int, num_steps: int) -> float:
        return num_computed * self.computed_step_s + (num_steps - num_computed) * self.reused_step_s

    def total_s(self, num_computed: int, num_steps: int) -> float:
        """Return the time of denoising and decoding."""
        return self.denoise_s(num_computed, num_steps) + self.decode_s

    def seconds_left(self, schedule: Schedule, step: int = 0) -> float:
        """Return the time from the start of ``step`` to the decoded image."""
        computed = sum(later >= step for later in schedule.computed_steps)
        reused = schedule.num_steps - step - computed
        return computed * self.computed_step_s + reused * self.reused_step_s + self.decode_s

    def scaled(self, factor: float) -> "LatencyEstimate":
        """Return the estimate for ``factor`` times as many tokens, assuming proportional times."""
        return self._times(factor, factor)

    def for_batch(self, num_images: int) -> "LatencyEstimate":
        """Return the estimate for a run of several images, which are decoded one by one."""
        return self._times(num_images**self.batch_exponent, num_images)

    def _times(self, steps: float, decoding: float) -> "LatencyEstimate":
        return replace(
            self,
            computed_step_s=self.computed_step_s * steps,
            reused_step_s=self.reused_step_s * steps,
            decode_s=self.decode_s * decoding,
        )


@dataclass
class RunPace:
    """The remaining time of a run, at the run's own pace as soon as it is known."""

    estimate: LatencyEstimate | None
    """Of the whole run; None if there is none."""
    schedule: Schedule
    clock: Callable[[], float] = field(default_factory=lambda: time.perf_counter)
    """Monotonic, in seconds."""
    began: float = 0.0

    def seconds_left(self, step: int) -> float | None:
        """Return the remaining time at the start of ``step``; None if it is unknown."""
        if self.estimate is None:
            return None
        if step == 0:
            self.began = self.clock()
        left = self.estimate.seconds_left(self.schedule, step)
        expected = self.estimate.seconds_left(self.schedule) - left
        known = self.estimate.computed_step_s  # the estimate counts as much as one computed step
        return left * (self.clock() - self.began + known) / (expected + known) if known > 0 else left


@dataclass(frozen=True)
class _Run:
    num_computed: int
    num_reused: int
    denoise_s: float
    decode_s: float

    def pace(self, share: float) -> float:
        """Return the time of a computed step."""
        return self.denoise_s / (self.num_computed + share * self.num_reused)


@dataclass
class _Size:
    """Runs with one number of tokens, and the estimate from them."""

    runs: deque[_Run] = field(default_factory=lambda: deque(maxlen=NUM_RUNS))
    estimate: LatencyEstimate | None = None

    def observe(self, run: _Run) -> None:
        self.runs.append(run)
        share = fit_share(self.runs)
        recent = list(self.runs)[-NUM_PACES:]
        weights = [min(each.num_computed + share * each.num_reused, MAX_PACE_STEPS) for each in recent]
        pace = weighted_median([each.pace(share) for each in recent], weights)
        decodes = [each.decode_s / each.pace(share) for each in list(self.runs)[-NUM_DECODES:] if each.denoise_s > 0]
        decode_s = statistics.median(decodes) * pace if decodes else run.decode_s
        self.estimate = LatencyEstimate(pace, share * pace, decode_s)


def fit_share(runs: Sequence[_Run]) -> float:
    """Return the share of a reused step with which the paces of successive runs differ least.

    The sum of the absolute logarithms of their ratios is minimized, so that a slow run, or a device that becomes slower
    for good, adds the same to every share.
    """
    timed = [run for run in runs if run.denoise_s > 0]
    costs = PRIOR_WEIGHT * np.abs(np.log((SHARES + REUSED_SHARE) / (2 * REUSED_SHARE)))
    if len(timed) > 1:
        steps = np.array([run.num_computed for run in timed]), np.array([run.num_reused for run in timed])
        seconds = np.array([run.denoise_s for run in timed])
        paces = np.log(seconds) - np.log(steps[0] + SHARES[:, None] * steps[1])
        costs = costs + np.abs(np.diff(paces)).sum(axis=1)
    return float(SHARES[np.argmin(costs)])


def weighted_median(values: Sequence[float], weights: Sequence[float]) -> float:
    """Return the smallest value with at least half of the weight at or below it."""
    covered = 0.0
    for value, weight in sorted(zip(values, weights, strict=True)):
        covered += weight
        if covered >= sum(weights) / 2:
            return value
    raise ValueError("no values")


class LatencyModel:
    """Learns the latency of images by their number of tokens. Thread-safe."""

    def __init__(self) -> None:
        self._sizes: dict[int, _Size] = {}
        self._exponents: deque[float] = deque(maxlen=NUM_DECODES)
        self._lock = threading.Lock()

    def observe(self, num_tokens: int, *, num_computed: int, num_steps: int, denoise_s: float, decode_s: float) -> None:
        """Record the times of an image. ``num_tokens`` includes its reference images."""
        with self._lock:
            size = self._sizes.setdefault(num_tokens, _Size())
            size.observe(_Run(num_computed, num_steps - num_computed, denoise_s, decode_s))

    def observe_batch(
        self, num_tokens: int, num_images: int, *, num_computed: int, num_steps: int, denoise_s: float
    ) -> None:
        """Record the denoising time of a run of several images."""
        alone = self.estimate(num_tokens)
        if alone is None or denoise_s <= 0 or alone.denoise_s(num_computed, num_steps) <= 0:
            return
        exponent = math.log(denoise_s / alone.denoise_s(num_computed, num_steps)) / math.log(num_images)
        with self._lock:
            self._exponents.append(min(max(exponent, 0.0), MAX_BATCH_EXPONENT))

    def estimate(self, num_tokens: int) -> LatencyEstimate | None:
        """Estimate an image, in proportion to the nearest observed size; None before the first image."""
        with self._lock:
            if not self._sizes:
                return None
            nearest = min(self._sizes, key=lambda tokens: max(tokens / num_tokens, num_tokens / tokens))
            estimate = self._sizes[nearest].estimate
            if estimate is None:
                return None
            exponent = statistics.median(self._exponents) if self._exponents else 1.0
            scaled = estimate if nearest == num_tokens else estimate.scaled(num_tokens / nearest)
            return replace(scaled, batch_exponent=exponent)
