"""Admission: permits for the slots of a queue, which are issued before any work for a request."""

import itertools
import math
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from flux2_shared.errors import Busy, Flux2Error
from generator_service.engine.generation import Generation

EXTRA_SLOTS = 2
"""Slots for requests that do not need the text encoder, while the others wait for it."""


@dataclass(eq=False)
class Permit:
    """A slot of the queue."""

    number: int
    """Order of admission."""
    admitted: float
    """When it was issued, by ``time.monotonic``."""
    owner: str
    turn: int
    """Order of service: the first turn that the owner has not used."""
    generation: Generation | None = None
    """The generation that holds it, and frees the slot when it ends."""


class Admission:
    """Issues the permits of a queue. Each owner has a share of them, and owners take turns.

    Args:
        capacity: returns the largest number of generations in flight.
        seconds_of: estimates the time until a number of generations have ended, for ``Retry-After``.
        share: share of the slots that one owner may have.
        is_cached: returns whether a prompt is cached, so that generations with it do not wait for a silent encoder.
    """

    def __init__(
        self,
        capacity: Callable[[], int],
        seconds_of: Callable[[int], float],
        share: float = 1.0,
        is_cached: Callable[[str], bool] = lambda _prompt: False,
    ) -> None:
        self.refusal: Callable[[], Flux2Error] | None = None
        """Makes the error of all further requests, once the queue is closed."""
        self._capacity = capacity
        self._seconds_of = seconds_of
        self._share = share
        self._is_cached = is_cached
        self._numbers = itertools.count()
        self._permits: set[Permit] = set()
        self._last_turns: dict[str, int] = {}
        """The last turn of each owner."""
        self.turn = 0
        """The last turn that was served."""

    @property
    def num_permits(self) -> int:
        """Number of permits that are not released."""
        return len(self._permits)

    @contextmanager
    def admit(self, owner: str = "", is_embedded: Callable[[], bool] = lambda: False) -> Iterator[Permit]:
        """Issue a permit. It is released after the block if no generation has taken it.

        Args:
            owner: whose request it is.
            is_embedded: returns whether the request does not need the text encoder; called if the queue is full.

        Raises:
            Busy: the queue, or the owner's share of it, is full; ``retry_after_s`` is an estimate.
            Flux2Error: the queue was closed with this error.
        """
        if self.refusal is not None:
            raise self.refusal()
        capacity = self._capacity()
        own = [permit for permit in self._permits if permit.owner == owner]
        if len(self._permits) >= capacity:
            self._check_extra_slot(self._permits, is_embedded, "the queue is full")
        if len(own) >= math.ceil(self._share * capacity):
            self._check_extra_slot(own, is_embedded, "this key has its share of the queue")
        self._last_turns = {each: last for each, last in self._last_turns.items() if last >= self.turn}
        turn = max(self.turn, self._last_turns.get(owner, -1) + 1)
        permit = Permit(next(self._numbers), time.monotonic(), owner, turn)
        self._last_turns[owner] = turn
        self._permits.add(permit)
        try:
            yield permit
        finally:
            if permit.generation is None:
                self.release(permit)
                if self._last_turns.get(owner) == turn:
                    self._last_turns[owner] = turn - 1  # refused requests do not delay later ones

    def release(self, permit: Permit) -> None:
        """Free the slot of ``permit``."""
        self._permits.discard(permit)

    def _check_extra_slot(self, permits: Collection[Permit], is_embedded: Callable[[], bool], reason: str) -> None:
        """Raise ``Busy`` unless nearly all permits wait for the text encoder, and this request would not."""
        num_encoding = sum(permit.generation is not None and self._is_held_up(permit.generation) for permit in permits)
        if num_encoding == 0 or len(permits) - num_encoding >= EXTRA_SLOTS or not is_embedded():
            raise Busy(f"the service is busy: {reason}", retry_after_s=self._seconds_of(self.num_permits))

    def _is_held_up(self, generation: Generation) -> bool:
        """Return whether a generation waits for the text encoder, and its prompt was not embedded for others."""
        return generation.is_encoding and not self._is_cached(generation.request.params.prompt or "")
