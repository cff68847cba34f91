"""The line before the device: who waits behind how many others, and for how long."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Queued:
    """A request's place in the line."""

    position: int
    """How many must end before its turn comes; with 0 it has come."""
    seconds: float | None
    """How long they will take, as far as it is known."""


@dataclass(eq=False)
class _Ticket:
    work_s: float | None
    tell: Callable[[Queued], None]


class Line:
    """Tells each request its place when it comes, and again whenever one before it is gone.

    Args:
        clock: seconds, monotonic.
        num_devices: how many requests are served at a time.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, num_devices: Callable[[], int] = lambda: 1) -> None:
        self._clock = clock
        self._num_devices = num_devices
        self._tickets: list[_Ticket] = []
        self._first_since = 0.0

    @contextmanager
    def waiting(self, work_s: float | None, tell: Callable[[Queued], None]) -> Iterator[None]:
        """Stand in the line with work of ``work_s`` seconds, None if unknown, for as long as the block lasts."""
        ticket = _Ticket(work_s, tell)
        if not self._tickets:
            self._first_since = self._clock()
        self._tickets.append(ticket)
        tell(self._place(len(self._tickets) - 1))
        try:
            yield
        finally:
            index = self._tickets.index(ticket)
            del self._tickets[index]
            if index == 0:
                self._first_since = self._clock()
            for later in range(index, len(self._tickets)):
                self._tickets[later].tell(self._place(later))

    def _place(self, index: int) -> Queued:
        devices = max(1, self._num_devices())
        position = max(0, index - devices + 1)
        if position == 0:
            return Queued(0, 0.0)
        before = [ticket.work_s for ticket in self._tickets[:index]]
        known = [seconds for seconds in before if seconds is not None]
        if len(known) < len(before):
            return Queued(position, None)
        known[0] = max(0.0, known[0] - (self._clock() - self._first_since))
        return Queued(position, sum(known) / devices)
