"""Who waits for the device, and who is next. Lives on the event loop; knows neither threads nor tensors.

A permit is taken before anything costs time, and its number is the order of admission. A generation enters the queue
with its permit, adds its images once its prompt is embedded, and leaves when it ends. The device takes the images that
are ready in the order of the permits' numbers; so the position that a generation is told is found by going through what
the device would take.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from flux2_shared.errors import Busy, Flux2Error
from generator_service.engine.events import Queued
from generator_service.engine.generation import Generation
from generator_service.pipelines.params import Params

FIRST_GUESS_S = 1.0
"""How long a generation is taken to last as long as nothing is known of any."""

Image = TypeVar("Image")


@dataclass(eq=False)
class Permit:
    """A slot of the queue."""

    number: int
    """In the order of admission."""
    is_taken: bool = False
    """By a generation, which then gives it back."""


@dataclass(eq=False)
class Work(Generic[Image]):
    """One image for the device."""

    generation: Generation
    params: Params
    index: int | None
    """Which image of its generation; None: a reference without a cache, which is not delivered."""
    result: "asyncio.Future[Image]"
    added: float
    started: float | None = None

    @property
    def estimate_s(self) -> float | None:
        """Estimated time on the device, in seconds."""
        return self.generation.request.seconds_left(self.params.schedule)

    @property
    def queue_s(self) -> float:
        """How long it waited for the device."""
        return 0.0 if self.started is None else self.started - self.added

    def finish(self, result: Image | Exception) -> None:
        """Answer, if anybody still waits."""
        if self.result.done():
            return
        if isinstance(result, Exception):
            self.result.set_exception(result)
        else:
            self.result.set_result(result)


@dataclass(eq=False)
class _Place(Generic[Image]):
    permit: Permit
    generation: Generation
    ready: list[Work[Image]] = field(default_factory=list)
    has_begun: bool = False


class Queue(Generic[Image]):
    """The order of service of one device, or an estimate of that of several.

    Args:
        capacity: how many generations may be admitted at a time.
        max_batch: how many images may share a run.
        batch_key: images with equal keys may share a run; one with the key None runs alone.
        num_devices: how many generations are served at a time.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        capacity: Callable[[], int],
        *,
        max_batch: int = 1,
        batch_key: Callable[[Work[Image]], object] = lambda _work: None,
        num_devices: Callable[[], int] = lambda: 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._capacity = capacity
        self._max_batch = max_batch
        self._batch_key = batch_key
        self._num_devices = num_devices
        self._clock = clock
        self._numbers = itertools.count()
        self._permits: set[Permit] = set()
        self._places: dict[Generation, _Place[Image]] = {}
        """In the order of admission."""
        self._running: list[Work[Image]] = []
        self._arrival = asyncio.Event()
        self._refusal: Callable[[], Flux2Error] | None = None

    @property
    def num_in_flight(self) -> int:
        """How many generations are admitted and have not ended."""
        return len(self._permits)

    @property
    def generations(self) -> list[Generation]:
        """Those that have entered, in the order of admission."""
        return list(self._places)

    @contextmanager
    def admit(self) -> Iterator[Permit]:
        """Hold a permit; one that no generation has taken within the block is given back.

        Raises:
            Busy: the queue is full; the error says when to come back.
            Flux2Error: the queue was closed with this error.
        """
        if self._refusal is not None:
            raise self._refusal()
        if len(self._permits) >= self._capacity():
            raise Busy("the service is busy: the queue is full", retry_after_s=self._seconds_of_all())
        permit = Permit(next(self._numbers))
        self._permits.add(permit)
        try:
            yield permit
        finally:
            if not permit.is_taken:
                self._permits.discard(permit)

    def enter(self, generation: Generation, permit: Permit) -> None:
        """Give ``generation`` the place of ``permit``.

        Raises:
            Flux2Error: the queue was closed meanwhile, with this error.
        """
        if self._refusal is not None:
            raise self._refusal()
        permit.is_taken = True
        places = [*self._places.values(), _Place(permit, generation)]
        places.sort(key=lambda place: place.permit.number)
        self._places = {place.generation: place for place in places}
        self._report()

    def add(self, generation: Generation, params: Params, index: int | None) -> Work[Image]:
        """An image of ``generation`` is ready for the device."""
        future = asyncio.get_running_loop().create_future()
        work = Work(generation, params, index, future, self._clock())
        self._places[generation].ready.append(work)
        self._arrival.set()
        self._report()
        return work

    def begin(self, generation: Generation) -> None:
        """The turn of ``generation`` has come."""
        place = self._places.get(generation)
        if place is not None and not place.has_begun:
            place.has_begun = True
            generation.begin()
            self._report()

    def leave(self, generation: Generation) -> None:
        """``generation`` has ended: its place is free, and what is not taken yet is dropped."""
        place = self._places.pop(generation)
        self._permits.discard(place.permit)
        self._report()

    async def take(self) -> list[Work[Image]]:
        """The images for the device's next run, as soon as there are any."""
        while not (batch := self._first_batch(self._ready())):
            self._arrival.clear()
            await self._arrival.wait()
        for work in batch:
            work.started = self._clock()
            self._places[work.generation].ready.remove(work)
        self._running = batch
        for work in batch:
            self.begin(work.generation)
        self._report()
        return batch

    def finish(self) -> None:
        """What was taken last has run."""
        self._running = []
        self._report()

    def close(self, error: Callable[[], Flux2Error]) -> None:
        """End every generation with ``error()``, and admit none any more."""
        self._refusal = error
        for generation in self.generations:
            generation.fail(error())

    def position(self, generation: Generation) -> Queued:
        """Where ``generation`` waits."""
        return self._position(self._places[generation], list(self._runs()))

    def _report(self) -> None:
        """Emit the positions that have changed, where a client follows the generation."""
        followed = [place for place in self._places.values() if place.generation.request.is_followed]
        runs = list(self._runs()) if followed else []
        for place in followed:
            queued = self._position(place, runs)
            if place.generation.queued is None or place.generation.queued.position != queued.position:
                place.generation.emit(queued)

    def _position(self, place: _Place[Image], runs: Sequence[Sequence[Work[Image]]]) -> Queued:
        if place.has_begun:
            return Queued(0, 0.0)
        before = list(itertools.takewhile(lambda run: all(w.generation is not place.generation for w in run), runs))
        seconds = [self._seconds_left(work) for run in before for work in run]
        others = {work.generation for run in before for work in run}
        if not place.ready:  # its prompt is not embedded yet: so may be those of some who were admitted earlier
            preparing = [p for p in self._places.values() if not p.ready and not p.has_begun]
            earlier = list(itertools.takewhile(lambda other: other is not place, preparing))
            others |= {other.generation for other in earlier}
            seconds += [other.generation.request.estimate_of_all_s for other in earlier]
        devices = max(1, self._num_devices())
        position = max(0, len(others) - devices + 1)
        if position == 0:
            return Queued(0, 0.0)
        return Queued(position, None if None in seconds else sum(filter(None, seconds)) / devices)

    def _runs(self) -> Iterator[list[Work[Image]]]:
        """What runs, and what the device would take after it."""
        if self._running:
            yield [work for work in self._running if work.generation in self._places]
        ready = self._ready()
        while batch := self._first_batch(ready):
            yield batch
            ready = [work for work in ready if work not in batch]

    def _first_batch(self, ready: Sequence[Work[Image]]) -> list[Work[Image]]:
        """The first of ``ready``, and what may share its run."""
        batch = list(ready[:1])
        key = self._batch_key(batch[0]) if batch and self._max_batch > 1 else None
        if key is not None:
            company = (work for work in ready[1:] if self._batch_key(work) == key)
            batch += itertools.islice(company, self._max_batch - 1)
        return batch

    def _ready(self) -> list[Work[Image]]:
        return [work for place in self._places.values() for work in place.ready]

    def _seconds_left(self, work: Work[Image]) -> float | None:
        if work.estimate_s is None or work.started is None:
            return work.estimate_s
        return max(0.0, work.estimate_s - (self._clock() - work.started))

    def _seconds_of_all(self) -> float:
        """How long everything in the queue will take; what is not known is taken to last as long as the rest."""
        seconds = [self._seconds_left(work) for run in self._runs() for work in run]
        preparing = [place for place in self._places.values() if not place.ready and not place.has_begun]
        seconds += [place.generation.request.estimate_of_all_s for place in preparing]
        known = [each for each in seconds if each is not None]
        unknown = len(self._permits) - len(self._places) + len(seconds) - len(known)
        guess = sum(known) / len(known) if known else FIRST_GUESS_S
        return (sum(known) + unknown * guess) / max(1, self._num_devices())
