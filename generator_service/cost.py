"""What a picture takes, known before it starts: a schedule says how many steps are computed."""

import threading
from dataclasses import dataclass, field

import numpy as np

FORGETTING = 0.8
"""How much one more picture of a size leaves of the weight of those before."""
REUSED_SHARE = 0.05
"""What a reused step is taken to cost of a computed one until pictures tell it."""
SHARE_WEIGHT = 1.0
"""How many steps that guess counts for."""


@dataclass(frozen=True)
class Cost:
    """Of a picture of some size, in seconds."""

    computed_step_s: float
    reused_step_s: float
    decode_s: float

    def denoise_s(self, num_computed: int, num_steps: int) -> float:
        """A whole run."""
        return num_computed * self.computed_step_s + (num_steps - num_computed) * self.reused_step_s

    def total_s(self, num_computed: int, num_steps: int) -> float:
        """A whole run and its decoding."""
        return self.denoise_s(num_computed, num_steps) + self.decode_s

    def scaled(self, factor: float) -> "Cost":
        """For a picture with ``factor`` times as many tokens: roughly in proportion."""
        return Cost(self.computed_step_s * factor, self.reused_step_s * factor, self.decode_s * factor)


@dataclass
class _Size:
    """What pictures of one number of tokens took: normal equations of a least-squares fit. Later ones weigh more."""

    products: np.ndarray = field(default_factory=lambda: np.zeros((2, 2)))
    totals: np.ndarray = field(default_factory=lambda: np.zeros(2))
    decode_s: float = 0.0
    cost: Cost | None = None

    def observe(self, num_computed: int, num_reused: int, denoise_s: float, decode_s: float) -> None:
        steps = np.array([num_computed, num_reused], dtype=float)
        self.products = FORGETTING * self.products + np.outer(steps, steps)
        self.totals = FORGETTING * self.totals + steps * denoise_s
        is_first = self.cost is None
        self.decode_s = decode_s if is_first else FORGETTING * self.decode_s + (1 - FORGETTING) * decode_s
        guess = np.array([-REUSED_SHARE, 1.0])  # reused - share * computed = 0
        computed, reused = np.linalg.solve(self.products + SHARE_WEIGHT * np.outer(guess, guess), self.totals)
        if reused > computed:  # noise has turned the two around, and no cache would seem to be the fastest
            computed = reused = self.totals.sum() / self.products.sum()
        self.cost = Cost(float(computed), max(float(reused), 0.0), self.decode_s)


class CostModel:
    """Learns from every finished picture, for each number of tokens. Safe to use from several threads."""

    def __init__(self) -> None:
        self._sizes: dict[int, _Size] = {}
        self._lock = threading.Lock()

    def observe(self, num_tokens: int, *, num_computed: int, num_steps: int, denoise_s: float, decode_s: float) -> None:
        """A picture with ``num_tokens``, reference images included, took so long."""
        with self._lock:
            size = self._sizes.setdefault(num_tokens, _Size())
            size.observe(num_computed, num_steps - num_computed, denoise_s, decode_s)

    def of(self, num_tokens: int) -> Cost | None:
        """What such a picture will take: as seen, else in proportion to the nearest size; None before the first."""
        with self._lock:
            if not self._sizes:
                return None
            nearest = min(self._sizes, key=lambda tokens: max(tokens / num_tokens, num_tokens / tokens))
            cost = self._sizes[nearest].cost
            return None if cost is None else cost.scaled(num_tokens / nearest)
