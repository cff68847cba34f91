"""The bounded queue in front of one device: many callers, one thread, work grouped into batches.

Callers first take a place, which is refused at once (429) when none is free, and then submit work. Work whose caller
has left is dropped before it reaches the device; the event loop is never blocked. The text encoder batches prompts with
it, the generator pictures that can share a run.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

from shared.errors import Busy, DeadlineExceeded

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


class DeviceQueue(Generic[Work, Result]):
    """Runs ``run(batch)`` on a thread of its own, for batches of at most ``max_batch`` that belong together.

    Who waits longest is always in the next batch; others may overtake only by joining it.

    Args:
        run: computes one result, or the exception that its caller gets, for each item of a batch, in order. An
            exception that it raises fails the whole batch.
        max_waiting: how many callers may wait while a batch runs.
        max_batch: the most items in one batch.
        max_wait_s: how long a batch that is not full waits for company.
        key: items with equal keys belong together; what has the key None runs alone. Everything does by default.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Work]], Sequence[Result | Exception]],
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
        self._num_places_taken = 0
        self._batch_s = FIRST_GUESS_S
        self._arrival = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._loop_task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._loop_task = asyncio.create_task(self._serve())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._loop_task is not None
        self._loop_task.cancel()
        await asyncio.gather(self._loop_task, return_exceptions=True)
        for entry in self._waiting:
            entry.answer.cancel()
        await asyncio.to_thread(self._thread.shutdown)

    @property
    def depth(self) -> int:
        """How many places are taken: by work that waits, runs, or is being prepared."""
        return self._num_places_taken

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold one of the ``max_waiting + max_batch`` places.

        Raises:
            Busy: none is free; the error says when to come back.
        """
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
        """
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

    def _give_up(self, entry: _Entry[Work, Result]) -> None:
        if entry in self._waiting and not entry.answer.done():
            entry.answer.set_exception(DeadlineExceeded("the deadline passed before it was this request's turn"))

    async def _serve(self) -> None:
        while True:
            await self._arrival.wait()
            if self._max_batch > 1 and len(self._waiting) < self._max_batch:
                await asyncio.sleep(self._max_wait_s)
            batch = self._next_batch()
            if batch:
                await self._run_batch(batch)

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
            loop = asyncio.get_running_loop()
            results = await loop.run_in_executor(self._thread, self._run, [entry.work for entry in batch])
        except Exception as error:  # noqa: BLE001 - whatever it is belongs to the callers, the queue goes on
            for entry in batch:
                if not entry.answer.done():
                    entry.answer.set_exception(error)
        else:
            for entry, result in zip(batch, results, strict=True):
                if entry.answer.done():
                    continue
                if isinstance(result, Exception):
                    entry.answer.set_exception(result)
                else:
                    entry.answer.set_result(Answer(result, began - entry.arrived))
        finally:
            self._batch_s += 0.3 * (time.monotonic() - began - self._batch_s)
