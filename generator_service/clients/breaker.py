"""A circuit breaker: fail fast while a service is unavailable."""

import time
from collections.abc import Callable

FAILURES_TO_OPEN = 3
OPEN_S = 2.0
"""Time between attempts while the circuit is open, in seconds."""


class CircuitBreaker:
    """Opens after several failures in a row; while open, one request per ``OPEN_S`` is allowed. A success closes it.

    Args:
        clock: monotonic, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._num_failures = 0
        self._next_attempt = 0.0

    @property
    def is_open(self) -> bool:
        return self._num_failures >= FAILURES_TO_OPEN

    def allow_request(self) -> bool:
        """Return whether a request may be sent now."""
        if self._num_failures < FAILURES_TO_OPEN:
            return True
        if self._clock() < self._next_attempt:
            return False
        self._next_attempt = self._clock() + OPEN_S
        return True

    def record_failure(self) -> None:
        self._num_failures += 1
        self._next_attempt = self._clock() + OPEN_S

    def record_success(self) -> None:
        self._num_failures = 0
