"""Estimates the time of an image from its number of tokens and of computed and reused steps."""

import threading
from dataclasses import dataclass, field

import numpy as np

from generator_service.lemica import Schedule

DECAY = 0.8
"""Factor by which each image of a size reduces the weight of the earlier ones."""
REUSED_SHARE = 0.05
"""Assumed time of a reused step relative to a computed one, until measurements replace it."""
SHARE_WEIGHT = 1.0
"""Weight of this assumption, in steps."""


@dataclass(frozen=True)
class LatencyEstimate:
    """Estimated times of an image of one size, in seconds."""

    computed_step_s: float
    reused_step_s: float
    decode_s: float

    def denoise_s(self, num_computed: int, num_steps: int) -> float:
        return num_computed * self.computed_step_s + (num_steps - num_computed) * self.reused_step_s

    def total_s(self, num_computed: int, num_steps: int) -> float:
        """Return the time of denoising and decoding."""
        return self.denoise_s(num_computed, num_steps) + self.decode_s

    def seconds_left(self, schedule: Schedule, step: int = 0) -> float:
        """Return the time from the start of ``step`` to the decoded image."""
        computed = sum(later >= step for later in schedule.computed_steps)
        return self.total_s(computed, schedule.num_steps - step)

    def scaled(self, factor: float) -> "LatencyEstimate":
        """Return the estimate for ``factor`` times as many tokens, assuming proportional times."""
        return LatencyEstimate(self.computed_step_s * factor, self.reused_step_s * factor, self.decode_s * factor)


@dataclass
class _Size:
    """Normal equations of a weighted least-squares fit to the images with one number of tokens."""

    products: np.ndarray = field(default_factory=lambda: np.zeros((2, 2)))
    totals: np.ndarray = field(default_factory=lambda: np.zeros(2))
    decode_s: float = 0.0
    estimate: LatencyEstimate | None = None

    def observe(self, num_computed: int, num_reused: int, denoise_s: float, decode_s: float) -> None:
        steps = np.array([num_computed, num_reused], dtype=float)
        self.products = DECAY * self.products + np.outer(steps, steps)
        self.totals = DECAY * self.totals + steps * denoise_s
        is_first = self.estimate is None
        self.decode_s = decode_s if is_first else DECAY * self.decode_s + (1 - DECAY) * decode_s
        prior = np.array([-REUSED_SHARE, 1.0])  # reused - share * computed = 0
        computed, reused = np.linalg.solve(self.products + SHARE_WEIGHT * np.outer(prior, prior), self.totals)
        if reused > computed:  # noise: otherwise running without a cache would seem the fastest
            computed = reused = self.totals.sum() / self.products.sum()
        self.estimate = LatencyEstimate(float(computed), max(float(reused), 0.0), self.decode_s)


class LatencyModel:
    """Learns the latency of images by their number of tokens. Thread-safe."""

    def __init__(self) -> None:
        self._sizes: dict[int, _Size] = {}
        self._lock = threading.Lock()

    def observe(self, num_tokens: int, *, num_computed: int, num_steps: int, denoise_s: float, decode_s: float) -> None:
        """Record the times of an image. ``num_tokens`` includes its reference images."""
        with self._lock:
            size = self._sizes.setdefault(num_tokens, _Size())
            size.observe(num_computed, num_steps - num_computed, denoise_s, decode_s)

    def estimate(self, num_tokens: int) -> LatencyEstimate | None:
        """Estimate an image, in proportion to the nearest observed size; None before the first image."""
        with self._lock:
            if not self._sizes:
                return None
            nearest = min(self._sizes, key=lambda tokens: max(tokens / num_tokens, num_tokens / tokens))
            estimate = self._sizes[nearest].estimate
            return estimate if estimate is None or nearest == num_tokens else estimate.scaled(num_tokens / nearest)
