"""The queue in front of the device: order of service, positions and permits."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from flux2_shared.errors import Busy, ShuttingDown
from generator_service.engine.events import EmittedEvent, Queued
from generator_service.engine.generation import Generation
from generator_service.engine.latency import LatencyEstimate
from generator_service.engine.queue import Queue
from generator_service.engine.request import Request
from generator_service.engine.slots import Work
from generator_service.lemica import schedule_for
from generator_service.pipelines.params import Params

pytestmark = pytest.mark.anyio

REQUEST = Request(Params(None, 64, 64, 4.0, 1, schedule_for("none", 1), prompt="a prompt"), is_followed=True)


def request_of(seconds: float | None, count: int = 1, width: int = 64) -> Request:
    """A request of ``count`` images that take ``seconds`` each."""
    latency = None if seconds is None else LatencyEstimate(seconds, 0.0, 0.0)
    return replace(REQUEST, params=replace(REQUEST.params, width=width), num_images=count, latency=latency)


class RecordedGeneration(Generation):
    """A generation that records the positions it emits."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.positions: list[Queued] = []

    def emit(self, event: EmittedEvent) -> None:
        assert isinstance(event, Queued)
        self.positions.append(event)
        super().emit(event)


class QueueHarness:
    """A queue with a simulated clock."""

    def __init__(self, capacity: int = 8, **options: Any) -> None:
        self.now = 100.0
        self.queue = Queue[None](lambda: capacity, clock=lambda: self.now, **options)

    def enter(self, request: Request) -> RecordedGeneration:
        """A generation that is admitted, and whose prompt is not embedded yet."""
        with self.queue.admit() as permit:
            generation = RecordedGeneration(request, on_end=self.queue.leave)
            self.queue.enter(generation, permit)
        return generation

    def add(self, generation: RecordedGeneration) -> RecordedGeneration:
        """Mark its prompt as embedded: its images are ready."""
        for index, params in enumerate(generation.request.all_params()):
            self.queue.add(generation, params, index)
        return generation

    def positions(self, *generations: Generation) -> list[int]:
        return [self.queue.position(generation).position for generation in generations]

    async def served(self) -> list[tuple[Generation, int | None]]:
        """Take and finish everything that is ready; returns the works in the order of service."""
        served_works = []
        while self.queue._next_batch():
            works = await self.queue.take()
            served_works += [(work.generation, work.index) for work in works]
            self.queue.finish()
        return served_works


async def test_positions_are_emitted() -> None:
    """A generation emits its position and wait at once, and again whenever a generation before it ends."""
    harness = QueueHarness()
    first = harness.add(harness.enter(request_of(5.0)))
    await harness.queue.take()
    harness.now += 1
    second = harness.add(harness.enter(request_of(7.0)))
    third = harness.add(harness.enter(request_of(3.0)))
    assert harness.queue.position(second) == Queued(1, 4.0)
    harness.now += 2
    second.cancel()
    assert first.positions == [Queued(0, 0.0)]
    assert second.positions == [Queued(1, 4.0)]
    assert third.positions == [Queued(2, 11.0), Queued(1, 2.0)]


async def test_remaining_time_is_never_negative() -> None:
    """Work that takes longer than estimated has 0 s left; the wait behind work without an estimate is unknown."""
    harness = QueueHarness()
    harness.add(harness.enter(request_of(5.0)))
    await harness.queue.take()
    harness.now += 9
    second = harness.add(harness.enter(request_of(None)))
    third = harness.add(harness.enter(request_of(1.0)))
    assert (harness.queue.position(second), harness.queue.position(third)) == (Queued(1, 0.0), Queued(2, None))


async def test_the_order_of_service_is_that_of_admission() -> None:
    """Of the generations that are ready, the one admitted first is served next, whichever prompt was embedded first."""
    harness = QueueHarness()
    first, second, third = (harness.enter(request_of(1.0)) for _ in range(3))
    for generation in (third, first, second):
        harness.add(generation)
    assert harness.positions(first, second, third) == [0, 1, 2]
    assert [generation for generation, _ in await harness.served()] == [first, second, third]


async def test_a_slow_prompt_is_overtaken() -> None:
    """A generation whose prompt is not embedded yet is behind every ready one, and does not delay it."""
    harness = QueueHarness()
    slow, quick, quicker = (harness.enter(request_of(1.0)) for _ in range(3))
    assert harness.positions(slow, quick, quicker) == [0, 1, 2]
    harness.add(quicker)
    harness.add(quick)
    assert harness.positions(slow, quick, quicker) == [2, 0, 1]
    works = await harness.queue.take()
    assert works[0].generation is quick
    harness.add(slow)
    assert harness.positions(slow, quicker) == [1, 2]  # admitted before the other one in the queue
    harness.queue.finish()
    quick.cancel()
    assert [generation for generation, _ in await harness.served()] == [slow, quicker]
    assert [queued.position for queued in slow.positions] == [0, 1, 2, 1, 0]


async def test_images_of_one_request_stay_together() -> None:
    """All images of a generation are served before those of a later one, for which they count as one position."""
    harness = QueueHarness()
    first, second = harness.enter(request_of(2.0, count=3)), harness.enter(request_of(1.0))
    harness.add(second)
    harness.add(first)
    assert harness.queue.position(second) == Queued(1, 6.0)
    assert await harness.served() == [(first, 0), (first, 1), (first, 2), (second, 0)]


def width_of(work: Work[None]) -> object:
    """The batch key: images of one width share a run, and wide ones run alone."""
    return None if work.params.width > 64 else work.params.width


async def test_positions_account_for_batches() -> None:
    """A generation that joins an earlier run overtakes others admitted before it, and its position says so."""
    harness = QueueHarness(max_batch=2, batch_key=width_of)
    small = request_of(1.0)
    wide = request_of(1.0, width=128)
    first, second, third, fourth = (harness.add(harness.enter(request)) for request in (small, wide, small, small))
    assert harness.positions(first, second, third, fourth) == [0, 2, 0, 3]
    assert [[work.generation for work in works] for works in [await harness.queue.take()]] == [[first, third]]
    harness.queue.finish()
    first.cancel()
    third.cancel()
    assert [generation for generation, _ in await harness.served()] == [second, fourth]


async def test_images_of_one_request_share_a_run() -> None:
    """With batching several images of one request share a run."""
    harness = QueueHarness(max_batch=3, batch_key=width_of)
    harness.add(harness.enter(request_of(1.0, count=4)))
    assert [work.index for work in await harness.queue.take()] == [0, 1, 2]
    harness.queue.finish()
    assert [work.index for work in await harness.queue.take()] == [3]


async def test_ended_generations_are_not_run() -> None:
    """The images of a generation that ended while it waited do not reach the device."""
    harness = QueueHarness()
    cancelled, kept = harness.add(harness.enter(request_of(1.0))), harness.add(harness.enter(request_of(1.0)))
    cancelled.cancel()
    assert await harness.served() == [(kept, 0)]


async def test_several_devices() -> None:
    """With several devices as many generations are at position 0, and the wait of the others is divided."""
    harness = QueueHarness(num_devices=lambda: 2)
    first, *others = (harness.add(harness.enter(request_of(6.0))) for _ in range(4))
    expected = [Queued(0, 0.0), Queued(0, 0.0), Queued(1, 6.0), Queued(2, 9.0)]
    assert [harness.queue.position(generation) for generation in (first, *others)] == expected
    first.cancel()
    assert [harness.queue.position(generation) for generation in others] == expected[:3]


async def test_permits_are_bounded_and_released() -> None:
    """There are as many permits as slots; a permit that is not used, or whose generation has ended, is free again."""
    harness = QueueHarness(capacity=2)
    first = harness.enter(request_of(3.0))
    with harness.queue.admit():
        with pytest.raises(Busy) as caught, harness.queue.admit():
            raise AssertionError
        assert harness.queue.num_in_flight == 2
    assert caught.value.retry_after_s == pytest.approx(6.0)  # three seconds, and as much for the unused permit
    assert harness.queue.num_in_flight == 1
    first.cancel()
    assert harness.queue.num_in_flight == 0


@pytest.mark.parametrize("end", [Generation.cancel, lambda each: each.fail(Busy("x")), lambda each: each.complete([])])
async def test_a_generation_ends_once(end: Callable[[Generation], None]) -> None:
    """However a generation ends, its slot is freed at once, its readers wake up, and later calls change nothing."""
    harness = QueueHarness()
    generation = harness.add(harness.enter(request_of(1.0)))
    reader = asyncio.create_task(generation.images())
    await asyncio.sleep(0)
    end(generation)
    assert harness.queue.num_in_flight == 0
    status, error = generation.status, generation.error
    generation.cancel()
    generation.complete([])
    generation.emit(Queued(5, None))
    assert (generation.status, generation.error) == (status, error)
    assert generation.queued == Queued(0, 0.0)
    await asyncio.gather(reader, return_exceptions=True)
    assert reader.done()


async def test_a_task_is_cancelled_before_its_first_run() -> None:
    """A generation that is cancelled before its task ran has no results and occupies no slot."""
    harness = QueueHarness()
    generation, has_run = harness.enter(request_of(1.0)), []

    async def work(_generation: Generation) -> list[Any]:
        has_run.append(True)
        return []

    generation.start(work, admitted=0.0)
    generation.cancel()
    await asyncio.sleep(0)
    assert (has_run, generation.status, harness.queue.num_in_flight) == ([], "cancelled", 0)


async def test_a_run_of_several_images_takes_the_time_of_one_run() -> None:
    """The wait behind images that share a run is the time of that run, not the sum of theirs."""
    harness = QueueHarness(max_batch=4, batch_key=lambda work: work.params.width)
    request = request_of(10.0)
    assert request.latency is not None
    request = replace(request, latency=replace(request.latency, batch_exponent=0.5))
    for _ in range(4):
        harness.add(harness.enter(request))
    last = harness.add(harness.enter(replace(request, params=replace(request.params, width=128))))
    assert harness.queue.position(last).seconds == pytest.approx(10.0 * 4**0.5)
    await harness.queue.take()
    harness.now += 5.0
    assert harness.queue.position(last).seconds == pytest.approx(10.0 * 4**0.5 - 5.0)


async def test_a_closed_queue_refuses() -> None:
    """After ``close`` generations end with its error, and no permit lets another enter."""
    line = QueueHarness()
    waiting = line.enter(request_of(1.0))
    with line.queue.admit() as permit:
        line.queue.close(ShuttingDown)
        with pytest.raises(ShuttingDown):
            await waiting.images()
        late = Generation(request_of(1.0), on_end=line.queue.leave)
        with pytest.raises(ShuttingDown):
            line.queue.enter(late, permit)
    with pytest.raises(ShuttingDown), line.queue.admit():
        raise AssertionError
    assert line.queue.num_in_flight == 0
