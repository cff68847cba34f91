"""A circuit breaker: fail fast while a service is unavailable."""

import time
from collections.abc import Callable

FAILURES_TO_OPEN = 3
OPEN_S = 2.0
"""Time between two attempts while the circuit is open: a service that returns is found within this time."""


class CircuitBreaker:
    """Closed while the service answers; open after several failures in a row, when one caller at a time may try.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._num_failures = 0
        self._next_attempt = 0.0

    @property
    def is_open(self) -> bool:
        """Whether the service failed when it was last asked."""
        return self._num_failures >= FAILURES_TO_OPEN

    def allow_request(self) -> bool:
        """Whether to ask the service now. While the circuit is open, only one caller per ``OPEN_S`` is allowed."""
        if self._num_failures < FAILURES_TO_OPEN:
            return True
        if self._clock() < self._next_attempt:
            return False
        self._next_attempt = self._clock() + OPEN_S
        return True

    def record_failure(self) -> None:
        """Count a request that the service did not answer."""
        self._num_failures += 1
        self._next_attempt = self._clock() + OPEN_S

    def record_success(self) -> None:
        """Close the circuit: the service has answered."""
        self._num_failures = 0
