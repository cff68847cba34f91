"""The text encoder's bounded queue: many callers, one device thread, work grouped into batches.

Callers are admitted first, or rejected at once (429) if the queue is full, and then submit work. Work whose caller has
left is dropped before it reaches the device. The event loop is never blocked.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

from flux2_shared.device.thread import DeviceThread, refuse_lost_device
from flux2_shared.errors import Busy, DeadlineExceeded, DeviceLost, ShuttingDown

Work = TypeVar("Work")
Result = TypeVar("Result")

DEFAULT_BATCH_S = 1.0
"""The assumed duration of a batch before one was timed."""


@dataclass(frozen=True)
class Completed(Generic[Result]):
    """A result and how long its work waited in the queue."""

    value: Result
    queue_s: float


@dataclass(frozen=True, eq=False)
class _Entry(Generic[Work, Result]):
    work: Work
    future: asyncio.Future[Completed[Result]]
    arrived: float

    def finish(self, result: Result | Exception, queue_s: float) -> None:
        if isinstance(result, Exception):
            self.fail(result)
        elif not self.future.done():
            self.future.set_result(Completed(result, queue_s))

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class DeviceQueue(Generic[Work, Result]):
    """Runs ``run(batch)`` on the device thread for batches of at most ``max_batch`` compatible items.

    The item that has waited longest is always in the next batch; others can overtake only by joining it.

    Args:
        run: computes for each item of a batch, in order, a result or the exception that its caller gets. If it raises
            an exception, the whole batch fails.
        thread: the device thread.
        max_waiting: the most items that may wait while a batch runs.
        max_batch: the most items in one batch.
        max_wait_s: how long a batch that is not full waits for more items.
        key: items with equal keys may share a batch; an item with the key None runs alone. By default all keys are
            equal.
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
        self._num_in_flight = 0
        self._batch_s = DEFAULT_BATCH_S
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
        """Fail all items with ``ShuttingDown`` and stop running batches."""
        if self._loop_task is not None:
            self._loop_task.cancel()
        self._is_closed = True
        fail_all([*self._running, *self._waiting], ShuttingDown())

    @property
    def depth(self) -> int:
        """The number of admitted items: waiting, running, or not submitted yet."""
        return self._num_in_flight

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Hold one of the queue's ``max_waiting + max_batch`` slots within the block.

        Raises:
            Busy: no slot is free; ``retry_after_s`` says when to retry.
            DeviceLost: the device has failed.
            ShuttingDown: the queue is closed.
        """
        self._raise_if_unavailable()
        if self._num_in_flight >= self._max_waiting + self._max_batch:
            rounds = self._num_in_flight / self._max_batch
            raise Busy("the service is busy: the queue is full", retry_after_s=rounds * self._batch_s)
        self._num_in_flight += 1
        try:
            yield
        finally:
            self._num_in_flight -= 1

    async def submit(self, work: Work, within_s: float | None = None) -> Completed[Result]:
        """Queue one item and wait for its result. Call it within ``admit``.

        Args:
            work: the item for ``run``.
            within_s: the longest time to wait before the item runs.

        Raises:
            DeadlineExceeded: the item waited longer than ``within_s`` and was not run.
            DeviceLost: the device failed before the item completed.
            ShuttingDown: the queue was closed before the item completed.
        """
        self._raise_if_unavailable()
        loop = asyncio.get_running_loop()
        entry = _Entry[Work, Result](work, loop.create_future(), time.monotonic())
        self._waiting.append(entry)
        self._arrival.set()
        if within_s is None:
            return await entry.future
        timer = loop.call_later(within_s, self._time_out, entry)
        try:
            return await entry.future
        finally:
            timer.cancel()

    def _raise_if_unavailable(self) -> None:
        self._thread.refuse_if_lost()
        if self._is_closed:
            raise ShuttingDown

    def _time_out(self, entry: _Entry[Work, Result]) -> None:
        if entry in self._waiting:
            entry.fail(DeadlineExceeded("the deadline passed before the prompt was encoded"))

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
        waiting = [entry for entry in self._waiting if not entry.future.done()]  # the others were cancelled
        batch = waiting[:1]
        key = self._key(batch[0].work) if batch else None
        if key is not None and self._max_batch > 1:
            compatible = [entry for entry in waiting[1:] if self._key(entry.work) == key]
            batch += compatible[: self._max_batch - 1]
        self._waiting = deque(entry for entry in waiting if entry not in batch)
        if not self._waiting:
            self._arrival.clear()
        return batch

    async def _run_batch(self, batch: list[_Entry[Work, Result]]) -> None:
        began = time.monotonic()
        try:
            results = await self._thread.call(run_checked, self._run, [entry.work for entry in batch])
        except DeviceLost as error:
            fail_all([*self._running, *self._waiting], error)
        except Exception as error:  # noqa: BLE001 - the error is passed to the callers, and the queue continues
            for entry in batch:
                entry.fail(error)
        else:
            for entry, result in zip(batch, results, strict=True):
                entry.finish(result, began - entry.arrived)
        finally:
            self._batch_s += 0.3 * (time.monotonic() - began - self._batch_s)


def run_checked(
    run: Callable[[Sequence[Work]], Sequence[Result | Exception]], works: Sequence[Work]
) -> Sequence[Result | Exception]:
    """Run a batch on the device thread, and raise ``DeviceLost`` if one of its errors means that."""
    results = run(works)
    for result in results:
        if isinstance(result, Exception):
            refuse_lost_device(result)
    return results


def fail_all(entries: Sequence[_Entry[Work, Result]], error: Exception) -> None:
    for entry in entries:
        entry.fail(error)
