"""Who waits for the device, and who is next."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from flux2_shared.errors import Busy
from generator_service.engine.events import ProgressEvent, Queued
from generator_service.engine.generation import Generation
from generator_service.engine.latency import LatencyEstimate
from generator_service.engine.queue import Queue, Work
from generator_service.engine.request import Request
from generator_service.lemica import schedule_for
from generator_service.pipelines.params import Params

pytestmark = pytest.mark.anyio

REQUEST = Request(Params(None, 64, 64, 4.0, 1, schedule_for("none", 1), prompt="a prompt"), is_followed=True)


def lasting(seconds: float | None, count: int = 1, width: int = 64) -> Request:
    """A request of ``count`` images that take ``seconds`` each."""
    latency = None if seconds is None else LatencyEstimate(seconds, 0.0, 0.0)
    return replace(REQUEST, params=replace(REQUEST.params, width=width), num_images=count, latency=latency)


class Heard(Generation):
    """A generation that keeps what it hears of its position."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.positions: list[Queued] = []

    def emit(self, event: ProgressEvent) -> None:
        """As a generation."""
        assert isinstance(event, Queued)
        self.positions.append(event)
        super().emit(event)


class Line:
    """A queue whose clock a test sets."""

    def __init__(self, capacity: int = 8, **options: Any) -> None:
        self.now = 100.0
        self.queue = Queue[None](lambda: capacity, clock=lambda: self.now, **options)

    def enter(self, request: Request) -> Heard:
        """A generation that is admitted, and whose prompt is not embedded yet."""
        with self.queue.admit() as permit:
            generation = Heard(request, on_end=self.queue.leave)
            self.queue.enter(generation, permit)
        return generation

    def add(self, generation: Heard) -> Heard:
        """Its prompt is embedded: its images are ready."""
        for index, params in enumerate(generation.request.all_params()):
            self.queue.add(generation, params, index)
        return generation

    def positions(self, *generations: Generation) -> list[int]:
        """What they would be told now."""
        return [self.queue.position(generation).position for generation in generations]

    async def served(self) -> list[tuple[Generation, int | None]]:
        """Take and finish everything that is ready; what came in which order."""
        order = []
        while self.queue._ready():
            works = await self.queue.take()
            order += [(work.generation, work.index) for work in works]
            self.queue.finish()
        return order


async def test_everybody_knows_their_position() -> None:
    """A generation hears how many are before it and for how long, and again whenever one of those is gone."""
    line = Line()
    first = line.add(line.enter(lasting(5.0)))
    await line.queue.take()
    line.now += 1
    second = line.add(line.enter(lasting(7.0)))
    third = line.add(line.enter(lasting(3.0)))
    assert line.queue.position(second) == Queued(1, 4.0)
    line.now += 2
    second.cancel()
    assert first.positions == [Queued(0, 0.0)]
    assert second.positions == [Queued(1, 4.0)]
    assert third.positions == [Queued(2, 11.0), Queued(1, 2.0)]


async def test_late_work_takes_no_negative_time() -> None:
    """Work that takes longer than was thought is expected to end any moment; work of unknown length is unknown."""
    line = Line()
    line.add(line.enter(lasting(5.0)))
    await line.queue.take()
    line.now += 9
    second = line.add(line.enter(lasting(None)))
    third = line.add(line.enter(lasting(1.0)))
    assert (line.queue.position(second), line.queue.position(third)) == (Queued(1, 0.0), Queued(2, None))


async def test_the_order_of_service_is_that_of_admission() -> None:
    """Whatever prompt is embedded first: among those that are ready the first admitted is the next."""
    line = Line()
    first, second, third = (line.enter(lasting(1.0)) for _ in range(3))
    for generation in (third, first, second):
        line.add(generation)
    assert line.positions(first, second, third) == [0, 1, 2]
    assert [generation for generation, _ in await line.served()] == [first, second, third]


async def test_a_slow_prompt_lets_others_pass_and_says_so() -> None:
    """A generation whose prompt is not embedded yet counts every ready one as before it; these do not wait for it."""
    line = Line()
    slow, quick, quicker = (line.enter(lasting(1.0)) for _ in range(3))
    assert line.positions(slow, quick, quicker) == [0, 1, 2]
    line.add(quicker)
    line.add(quick)
    assert line.positions(slow, quick, quicker) == [2, 0, 1]
    works = await line.queue.take()
    assert works[0].generation is quick
    line.add(slow)
    assert line.positions(slow, quicker) == [1, 2]  # admitted earlier than the other that waits
    line.queue.finish()
    quick.cancel()
    assert [generation for generation, _ in await line.served()] == [slow, quicker]
    assert [queued.position for queued in slow.positions] == [0, 1, 2, 1, 0]


async def test_images_of_one_request_stay_together() -> None:
    """All images of a generation come before those of a later one, which counts it once."""
    line = Line()
    first, second = line.enter(lasting(2.0, count=3)), line.enter(lasting(1.0))
    line.add(second)
    line.add(first)
    assert line.queue.position(second) == Queued(1, 6.0)
    assert await line.served() == [(first, 0), (first, 1), (first, 2), (second, 0)]


def kind(work: Work[None]) -> object:
    """Images of one width share a run; wide ones run alone."""
    return None if work.params.width > 64 else work.params.width


async def test_positions_know_batches() -> None:
    """Who joins an earlier run is served with it, before others that were admitted earlier, and is told so."""
    line = Line(max_batch=2, batch_key=kind)
    small = lasting(1.0)
    wide = lasting(1.0, width=128)
    first, second, third, fourth = (line.add(line.enter(request)) for request in (small, wide, small, small))
    assert line.positions(first, second, third, fourth) == [0, 2, 0, 3]
    assert [[work.generation for work in works] for works in [await line.queue.take()]] == [[first, third]]
    line.queue.finish()
    first.cancel()
    third.cancel()
    assert [generation for generation, _ in await line.served()] == [second, fourth]


async def test_images_of_one_request_share_a_run() -> None:
    """Where batching is on, several images of one request are taken together."""
    line = Line(max_batch=3, batch_key=kind)
    line.add(line.enter(lasting(1.0, count=4)))
    assert [work.index for work in await line.queue.take()] == [0, 1, 2]
    line.queue.finish()
    assert [work.index for work in await line.queue.take()] == [3]


async def test_what_has_ended_is_never_taken() -> None:
    """The images of a generation that ended while it waited do not reach the device."""
    line = Line()
    gone, stays = line.add(line.enter(lasting(1.0))), line.add(line.enter(lasting(1.0)))
    gone.cancel()
    assert await line.served() == [(stays, 0)]


async def test_several_devices() -> None:
    """Where several are served at a time, so many have their turn, and the others wait a share of the time."""
    line = Line(num_devices=lambda: 2)
    first, *others = (line.add(line.enter(lasting(6.0))) for _ in range(4))
    expected = [Queued(0, 0.0), Queued(0, 0.0), Queued(1, 6.0), Queued(2, 9.0)]
    assert [line.queue.position(generation) for generation in (first, *others)] == expected
    first.cancel()
    assert [line.queue.position(generation) for generation in others] == expected[:3]


async def test_a_permit_is_the_first_thing() -> None:
    """So many permits as there are places; one that nobody used, or whose generation ended, is free again."""
    line = Line(capacity=2)
    first = line.enter(lasting(3.0))
    with line.queue.admit():
        with pytest.raises(Busy) as caught, line.queue.admit():
            raise AssertionError
        assert line.queue.num_in_flight == 2
    assert caught.value.retry_after_s == pytest.approx(6.0)  # three seconds, and as much for what is not known yet
    assert line.queue.num_in_flight == 1
    first.cancel()
    assert line.queue.num_in_flight == 0


@pytest.mark.parametrize("end", [Generation.cancel, lambda each: each.fail(Busy("x")), lambda each: each.complete([])])
async def test_a_generation_ends_once(end: Callable[[Generation], None]) -> None:
    """However it ends, its place is free at once, its readers wake, and what comes later changes nothing."""
    line = Line()
    generation = line.add(line.enter(lasting(1.0)))
    reader = asyncio.create_task(generation.images())
    await asyncio.sleep(0)
    end(generation)
    assert line.queue.num_in_flight == 0
    status, error = generation.status, generation.error
    generation.cancel()
    generation.complete([])
    generation.emit(Queued(5, None))
    assert (generation.status, generation.error) == (status, error)
    assert generation.queued == Queued(0, 0.0)
    await asyncio.gather(reader, return_exceptions=True)
    assert reader.done()


async def test_a_task_that_never_began_is_cancelled_without_a_trace() -> None:
    """A generation that is cancelled before its task ran once has neither results nor a place."""
    line = Line()
    generation, has_run = line.enter(lasting(1.0)), []

    async def work(_generation: Generation) -> list[Any]:
        has_run.append(True)
        return []

    generation.start(work)
    generation.cancel()
    await asyncio.sleep(0)
    assert (has_run, generation.status, line.queue.num_in_flight) == ([], "cancelled", 0)
