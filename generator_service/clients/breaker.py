"""A circuit breaker: fail fast while a service is unavailable, or accepts requests and answers none."""

import asyncio
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from flux2_shared.errors import Flux2Error

FAILURES_TO_OPEN = 3
OPEN_S = 2.0
"""Time between attempts while the circuit is open, in seconds."""
PATIENCE_DECAY = 0.9
"""How much of the patience with a slow service each quick answer leaves, because answers may come from its cache."""


class CircuitOpen(Exception):
    """The request must not be sent now."""


@dataclass(eq=False)
class _Request:
    limit: asyncio.Timeout
    began: float
    is_counted: bool = False
    """Whether it has been counted as a failure."""
    timer: asyncio.TimerHandle | None = None


class CircuitBreaker:
    """Opens after several failures in a row; while open, one request at a time is tried. An answer closes it.

    A request that waits in silence is a failure, too, and if that opens the circuit, all waiting requests end. It is
    silent if no request was answered for ``patience_s``, or for twice as long as the last answers took: a slow service
    under load is not silent.

    Args:
        failures: the errors that are failures; any other ``Flux2Error`` is an answer.
        patience_s: infinite to leave requests to their own time limits.
    """

    def __init__(self, failures: tuple[type[Exception], ...], patience_s: float = math.inf) -> None:
        self._failures = failures
        self._num_failures = 0
        self._next_trial = 0.0
        self._trial: _Request | None = None
        self._shortest_patience_s = self._patience_s = patience_s
        self._answered = -math.inf
        self._waiting: set[_Request] = set()

    @property
    def is_open(self) -> bool:
        return self._num_failures >= FAILURES_TO_OPEN

    @contextmanager
    def sending(self, limit: asyncio.Timeout) -> Iterator[None]:
        """Send a request in the block, within ``limit``, which expires early if the circuit opens because of silence.

        A trial may take as long as its own limit, so that a slow service can pass it.

        Raises:
            CircuitOpen: the circuit is open, and a trial is running or has ended just now.
        """
        request = _Request(limit, time.monotonic())
        if self._num_failures < FAILURES_TO_OPEN:
            self._waiting.add(request)
            request.timer = asyncio.get_running_loop().call_later(self._patience_s, self._check, request)
        elif self._trial is None and request.began >= self._next_trial:
            self._trial = request
            self._next_trial = request.began + OPEN_S
        else:
            raise CircuitOpen
        is_answered = False
        try:
            yield
            is_answered = True
        except self._failures:
            self._record_failure(request)
            raise
        except Flux2Error:
            is_answered = True
            raise
        finally:
            self._waiting.discard(request)
            if request.timer is not None:
                request.timer.cancel()
            self._trial = None if self._trial is request else self._trial
            if is_answered:
                self._num_failures = 0
                self._answered = time.monotonic()
                taken_s = self._answered - request.began
                self._patience_s = max(self._shortest_patience_s, 2 * taken_s, PATIENCE_DECAY * self._patience_s)

    def _check(self, request: _Request) -> None:
        """Count a request that waits in silence as a failure."""
        loop = asyncio.get_running_loop()
        rest = max(request.began, self._answered) + self._patience_s - time.monotonic()
        if rest > 0:
            request.timer = loop.call_later(rest, self._check, request)
            return
        self._record_failure(request)
        for each in self._waiting if self.is_open else ():
            if not each.limit.expired():
                each.limit.reschedule(loop.time())

    def _record_failure(self, request: _Request) -> None:
        self._num_failures += not request.is_counted
        self._next_trial = time.monotonic() + OPEN_S
        request.is_counted = True

    def record_reachable(self) -> None:
        """Close the circuit, but open it again after one failure: the service answers, if not requests like these."""
        self._num_failures = min(self._num_failures, FAILURES_TO_OPEN - 1)
