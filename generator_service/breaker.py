"""Stops asking a service that is away, for a while, so that callers are refused at once instead of after a timeout."""

import time
from collections.abc import Callable

FAILURES_TO_OPEN = 3
OPEN_S = 2.0
"""Between two attempts while the service is away: it is found again within this time of its return."""


class Breaker:
    """Closed while the service answers; open after so many failures in a row; then one caller at a time may try.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._num_failures = 0
        self._next_attempt = 0.0

    @property
    def is_open(self) -> bool:
        """Whether the service was away when it was last asked."""
        return self._num_failures >= FAILURES_TO_OPEN

    def allows(self) -> bool:
        """Whether to ask the service now. Of the callers of an open breaker one is told to, each time."""
        if not self.is_open:
            return True
        if self._clock() < self._next_attempt:
            return False
        self._next_attempt = self._clock() + OPEN_S
        return True

    def failed(self) -> None:
        """The service is away."""
        self._num_failures += 1
        self._next_attempt = self._clock() + OPEN_S

    def answered(self) -> None:
        """The service is there."""
        self._num_failures = 0
