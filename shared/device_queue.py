"""The bounded queue in front of one device: many callers, one thread, work grouped into batches.

Callers first take a place, which is refused at once (429) when none is free, and then submit work. Work whose caller
has left is dropped before it reaches the device; the event loop is never blocked. The text encoder batches prompts with
it, the generator pictures that can share a run.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

from shared.device_thread import DeviceThread, refuse_lost_device
from shared.errors import Busy, DeadlineExceeded, DeviceLost, ShuttingDown

Work = TypeVar("Work")
Result = TypeVar("Result")

FIRST_GUESS_S = 1.0
"""How long a batch is taken to last before one was timed."""


@dataclass(frozen=True)
class Answer(Generic[Result]):
    """A result and how long its work waited in the queue."""

    value: Result
    queue_s: float


@dataclass(frozen=True, eq=False)
class _Entry(Generic[Work, Result]):
    work: Work
    answer: asyncio.Future[Answer[Result]]
    arrived: float

    def finish(self, result: Result | Exception, queue_s: float) -> None:
        """Answer, if the caller is still there."""
        if isinstance(result, Exception):
            self.fail(result)
        elif not self.answer.done():
            self.answer.set_result(Answer(result, queue_s))

    def fail(self, error: Exception) -> None:
        """Answer with an error, if the caller is still there."""
        if not self.answer.done():
            self.answer.set_exception(error)


class DeviceQueue(Generic[Work, Result]):
    """Runs ``run(batch)`` on the device's thread, for batches of at most ``max_batch`` that belong together.

    Who waits longest is always in the next batch; others may overtake only by joining it.

    Args:
        run: computes one result, or the exception that its caller gets, for each item of a batch, in order. An
            exception that it raises fails the whole batch.
        thread: the device's.
        max_waiting: how many callers may wait while a batch runs.
        max_batch: the most items in one batch.
        max_wait_s: how long a batch that is not full waits for company.
        key: items with equal keys belong together; what has the key None runs alone. Everything does by default.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Work]], Sequence[Result | Exception]],
        thread: DeviceThread,
        *,
        max_waiting: int,
        max_batch: int = 1,
        max_wait_s: float = 0.0,
        key: Callable[[Work], object] = lambda _work: "",
    ) -> None:
        self._key = key
        self._run = run
        self._max_waiting = max_waiting
        self._max_batch = max_batch
        self._max_wait_s = max_wait_s
        self._waiting: deque[_Entry[Work, Result]] = deque()
        self._running: list[_Entry[Work, Result]] = []
        self._num_places_taken = 0
        self._batch_s = FIRST_GUESS_S
        self._arrival = asyncio.Event()
        self._is_closed = False
        self._thread = thread
        self._loop_task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._loop_task = asyncio.create_task(self._serve())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._loop_task is not None
        self.close()
        await asyncio.gather(self._loop_task, return_exceptions=True)

    def close(self) -> None:
        """Answer everyone with ``ShuttingDown``; nothing is run any more."""
        if self._loop_task is not None:
            self._loop_task.cancel()
        self._is_closed = True
        self._fail(ShuttingDown())

    @property
    def depth(self) -> int:
        """How many places are taken: by work that waits, runs, or is being prepared."""
        return self._num_places_taken

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold one of the ``max_waiting + max_batch`` places.

        Raises:
            Busy: none is free; the error says when to come back.
            DeviceLost: nothing can run any more.
        """
        self._refuse_at_the_end()
        if self._num_places_taken >= self._max_waiting + self._max_batch:
            rounds = self._num_places_taken / self._max_batch
            raise Busy("the service is busy: the queue is full", retry_after_s=rounds * self._batch_s)
        self._num_places_taken += 1
        try:
            yield
        finally:
            self._num_places_taken -= 1

    async def submit(self, work: Work, within_s: float | None = None) -> Answer[Result]:
        """Queue one item and wait for its result. Call it while holding a ``place``.

        Args:
            work: what ``run`` gets.
            within_s: how long it may wait before it runs.

        Raises:
            DeadlineExceeded: it waited longer; it was never run.
            DeviceLost: the device failed before the result was there.
            ShuttingDown: the queue was closed before the result was there.
        """
        self._refuse_at_the_end()
        loop = asyncio.get_running_loop()
        entry = _Entry[Work, Result](work, loop.create_future(), time.monotonic())
        self._waiting.append(entry)
        self._arrival.set()
        if within_s is None:
            return await entry.answer
        timer = loop.call_later(within_s, self._give_up, entry)
        try:
            return await entry.answer
        finally:
            timer.cancel()

    def _refuse_at_the_end(self) -> None:
        self._thread.refuse_if_lost()
        if self._is_closed:
            raise ShuttingDown

    def _give_up(self, entry: _Entry[Work, Result]) -> None:
        if entry in self._waiting and not entry.answer.done():
            entry.answer.set_exception(DeadlineExceeded("the deadline passed before it was this request's turn"))

    async def _serve(self) -> None:
        while True:
            await self._arrival.wait()
            if self._max_batch > 1 and len(self._waiting) < self._max_batch:
                await asyncio.sleep(self._max_wait_s)
            self._running = self._next_batch()
            if self._running:
                await self._run_batch(self._running)
            self._running = []

    def _next_batch(self) -> list[_Entry[Work, Result]]:
        waiting = [entry for entry in self._waiting if not entry.answer.done()]  # their callers are still there
        batch = waiting[:1]
        key = self._key(batch[0].work) if batch else None
        if key is not None and self._max_batch > 1:
            company = [entry for entry in waiting[1:] if self._key(entry.work) == key]
            batch += company[: self._max_batch - 1]
        self._waiting = deque(entry for entry in waiting if entry not in batch)
        if not self._waiting:
            self._arrival.clear()
        return batch

    async def _run_batch(self, batch: list[_Entry[Work, Result]]) -> None:
        began = time.monotonic()
        try:
            results = await self._thread.call(self._run_checked, [entry.work for entry in batch])
        except DeviceLost as error:
            self._fail(error)
        except Exception as error:  # noqa: BLE001 - whatever it is belongs to the callers, the queue goes on
            for entry in batch:
                entry.fail(error)
        else:
            for entry, result in zip(batch, results, strict=True):
                entry.finish(result, began - entry.arrived)
        finally:
            self._batch_s += 0.3 * (time.monotonic() - began - self._batch_s)

    def _run_checked(self, works: Sequence[Work]) -> Sequence[Result | Exception]:
        """On the device's thread: no result of a device that was lost meanwhile is delivered."""
        results = self._run(works)
        for result in results:
            if isinstance(result, Exception):
                refuse_lost_device(result)
        return results

    def _fail(self, error: Exception) -> None:
        """End everything that runs or waits with ``error``."""
        for entry in [*self._running, *self._waiting]:
            entry.fail(error)
