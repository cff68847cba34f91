"""The order of service. Belongs to the event loop; uses neither threads nor tensors.

A generation enters the queue with its permit, adds its images once its prompt is embedded, and leaves when it ends. The
device takes ready images in the order of the permits' turns, and those of equal turns in the order of their numbers, so
that owners take turns, and the requests of one owner are served in the order of admission. The position of a generation
is computed by simulating the next runs.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic

from flux2_shared.errors import Flux2Error
from generator_service.engine.admission import Admission, Permit
from generator_service.engine.events import Queued
from generator_service.engine.generation import Generation
from generator_service.engine.slots import Image, Slot, Work
from generator_service.pipelines.params import Params

DEFAULT_ESTIMATE_S = 1.0
"""Assumed time of a generation while no estimate is known, in seconds."""


class Queue(Generic[Image]):
    """The queue of one device, or an estimate for several devices.

    Args:
        capacity: returns the largest number of generations in flight.
        max_batch: largest number of images in a run.
        batch_key: images with equal keys may share a run; an image with the key None runs alone.
        num_devices: returns the number of generations that run concurrently.
        share: share of the slots that one owner may have.
        is_cached: returns whether the embedding of a prompt is cached.
        clock: monotonic, in seconds.
    """

    def __init__(
        self,
        capacity: Callable[[], int],
        *,
        max_batch: int = 1,
        batch_key: Callable[[Work[Image]], object] = lambda _work: None,
        num_devices: Callable[[], int] = lambda: 1,
        share: float = 1.0,
        is_cached: Callable[[str], bool] = lambda _prompt: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_batch = max_batch
        self._batch_key = batch_key
        self._num_devices = num_devices
        self._clock = clock
        self._admission = Admission(capacity, self._seconds_of, share, is_cached)
        self.admit = self._admission.admit
        self._slots: dict[Generation, Slot[Image]] = {}  # in the order of service
        self._running: list[Work[Image]] = []
        self._arrival = asyncio.Event()

    @property
    def num_in_flight(self) -> int:
        return self._admission.num_permits

    @property
    def generations(self) -> list[Generation]:
        """All generations in the queue, in the order of service."""
        return list(self._slots)

    def enter(self, generation: Generation, permit: Permit) -> None:
        """Give ``generation`` the slot of ``permit``; raise the queue's error if it was closed meanwhile."""
        if self._admission.refusal is not None:
            raise self._admission.refusal()
        permit.generation = generation
        slots = [*self._slots.values(), Slot(permit, generation)]
        slots.sort(key=lambda slot: (slot.permit.turn, slot.permit.number))
        self._slots = {slot.generation: slot for slot in slots}
        self._report()

    def add(self, generation: Generation, params: Params, index: int | None) -> Work[Image]:
        """Add an image of ``generation`` that is ready for the device."""
        future = asyncio.get_running_loop().create_future()
        work = Work(generation, params, index, future, self._clock())
        self._slots[generation].ready.append(work)
        self._arrival.set()
        self._report()
        return work

    def begin(self, generation: Generation) -> None:
        """Mark ``generation`` as begun."""
        slot = self._slots.get(generation)
        if slot is not None and not slot.has_begun:
            slot.has_begun = True
            self._admission.turn = max(self._admission.turn, slot.permit.turn)
            self._report()

    def leave(self, generation: Generation) -> None:
        """Free the slot of ``generation``, which has ended, and drop its remaining images."""
        slot = self._slots.pop(generation)
        self._admission.release(slot.permit)
        self._report()

    async def take(self) -> list[Work[Image]]:
        """Wait for the images of the next run, and take them."""
        while not (batch := self._next_batch()):
            self._arrival.clear()
            await self._arrival.wait()
        for work in batch:
            work.started = self._clock()
            slot = self._slots[work.generation]
            slot.ready.remove(work)
            slot.has_begun = True
            self._admission.turn = max(self._admission.turn, slot.permit.turn)
        self._running = batch
        self._report()
        return batch

    def finish(self) -> None:
        """Mark the run that was taken last as finished."""
        self._running = []
        self._report()

    def close(self, error: Callable[[], Flux2Error]) -> None:
        """Fail every generation with ``error()`` and refuse new ones with it."""
        self._admission.refusal = error
        for generation in self.generations:
            generation.fail(error())

    def _seconds_of(self, num_permits: int) -> float:
        """Estimate the time until all generations have ended, and those that are not in the queue yet."""
        return self._forecast().seconds_of_all(num_permits)

    def position(self, generation: Generation) -> Queued:
        """Return the position of ``generation`` and the estimated time until its turn."""
        return self._forecast().position(self._slots[generation])

    def _report(self) -> None:
        """Emit changed positions to generations that are followed by a client."""
        followed = [slot for slot in self._slots.values() if slot.generation.request.is_followed]
        if followed:
            self._forecast().emit(followed)

    def _forecast(self) -> "_Forecast[Image]":
        return _Forecast(list(self._slots.values()), list(self._runs()), self._clock(), max(1, self._num_devices()))

    def _runs(self) -> Iterator[list[Work[Image]]]:
        """Simulate the service: yield the current run, then the runs that follow."""
        if running := [work for work in self._running if work.generation in self._slots]:
            yield running
        served: list[Work[Image]] = []
        while batch := self._next_batch(served):
            yield batch
            served += batch

    def _next_batch(self, served: Sequence[Work[Image]] = ()) -> list[Work[Image]]:
        """Return the first image that is ready and not in ``served``, and those that may share its run."""
        ready = [work for slot in self._slots.values() for work in slot.ready if work not in served]
        key = self._batch_key(ready[0]) if ready and self._max_batch > 1 else None
        compatible = (work for work in ready[1:] if key is not None and self._batch_key(work) == key)
        return [*ready[:1], *itertools.islice(compatible, self._max_batch - 1)]


@dataclass(frozen=True)
class _Forecast(Generic[Image]):
    """Predicted order of service."""

    slots: Sequence[Slot[Image]]
    """All slots, in the order of service."""
    runs: Sequence[Sequence[Work[Image]]]
    """All runs, in the order of service."""
    now: float
    num_devices: int

    def emit(self, slots: Sequence[Slot[Image]]) -> None:
        for slot in slots:
            queued = self.position(slot)
            if slot.generation.queued is None or slot.generation.queued.position != queued.position:
                slot.generation.emit(queued)

    def position(self, slot: Slot[Image]) -> Queued:
        if slot.has_begun:
            return Queued(0, 0.0)
        before = list(itertools.takewhile(lambda run: all(w.generation is not slot.generation for w in run), self.runs))
        seconds = [self._seconds_left(run) for run in before]
        others = {work.generation for run in before for work in run}
        if not slot.ready:  # its prompt is not embedded yet; earlier ones may be in the same state
            earlier = list(itertools.takewhile(lambda other: other is not slot, self._embedding()))
            others |= {other.generation for other in earlier}
            seconds += [other.generation.request.estimate_of_all_s for other in earlier]
        position = max(0, len(others) - self.num_devices + 1)
        if position == 0:
            return Queued(0, 0.0)
        return Queued(position, None if None in seconds else sum(filter(None, seconds)) / self.num_devices)

    def seconds_of_all(self, num_permits: int) -> float:
        """Estimate the time for the whole queue; unknown generations are assumed to take the mean of the others."""
        seconds = [self._seconds_left(run) for run in self.runs]
        seconds += [slot.generation.request.estimate_of_all_s for slot in self._embedding()]
        known = [each for each in seconds if each is not None]
        num_unknown = num_permits - len(self.slots) + len(seconds) - len(known)
        mean = sum(known) / len(known) if known else DEFAULT_ESTIMATE_S
        return (sum(known) + num_unknown * mean) / self.num_devices

    def _embedding(self) -> list[Slot[Image]]:
        """Return the slots whose prompt is not embedded yet."""
        return [slot for slot in self.slots if slot.is_encoding]

    def _seconds_left(self, run: Sequence[Work[Image]]) -> float | None:
        first = run[0]
        latency = first.generation.request.latency
        if latency is None:
            return None
        expected_s = first.expected_s or latency.for_batch(len(run)).seconds_left(first.params.schedule)
        return expected_s if first.started is None else max(0.0, expected_s - (self.now - first.started))
