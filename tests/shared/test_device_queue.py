"""The bounded queue in front of a device."""

import asyncio
import threading
from collections.abc import Sequence

import pytest

from flux2_shared.device.queue import DeviceQueue
from flux2_shared.device.thread import DeviceThread
from flux2_shared.errors import Busy, DeadlineExceeded

pytestmark = pytest.mark.anyio


class Gate:
    """Work that waits for the test, and records the items that reached the device."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.batches: list[list[int]] = []

    def __call__(self, batch: Sequence[int]) -> list[int]:
        """Double each number once the gate is open."""
        self.batches.append(list(batch))
        assert self.opened.wait(5)
        return [2 * number for number in batch]


async def submit_number(queue: DeviceQueue[int, int], number: int) -> int:
    """Acquire a slot and submit a number."""
    with queue.admit():
        return (await queue.submit(number)).value


async def test_calls_wait_or_are_refused() -> None:
    """Of 200 simultaneous callers 1 runs, 8 wait, and 191 are refused with a time to retry after."""
    gate = Gate()
    async with DeviceThread() as thread, DeviceQueue[int, int](gate, thread, max_waiting=8) as queue:
        calls = [asyncio.create_task(submit_number(queue, number)) for number in range(200)]
        await asyncio.sleep(0.05)
        gate.opened.set()
        results = await asyncio.gather(*calls, return_exceptions=True)
    refused = [r for r in results if isinstance(r, Busy)]
    assert [r for r in results if isinstance(r, int)] == [2 * n for n in range(9)]
    assert len(refused) == 191
    assert all(r.retry_after_s is not None and r.retry_after_s > 0 for r in refused)


async def test_work_that_arrives_together_shares_a_batch() -> None:
    """Up to ``max_batch`` items that arrive within the wait form one batch, in order of arrival."""
    gate = Gate()
    gate.opened.set()
    async with (
        DeviceThread() as thread,
        DeviceQueue[int, int](gate, thread, max_waiting=20, max_batch=4, max_wait_s=0.02) as queue,
    ):
        assert await asyncio.gather(*(submit_number(queue, n) for n in range(6))) == [0, 2, 4, 6, 8, 10]
    assert gate.batches == [[0, 1, 2, 3], [4, 5]]


async def test_work_of_a_cancelled_caller_never_runs() -> None:
    """A cancelled caller's slot is free again, and its work is dropped when the batch is formed."""
    gate = Gate()
    async with DeviceThread() as thread, DeviceQueue[int, int](gate, thread, max_waiting=2) as queue:
        first, second, third = (asyncio.create_task(submit_number(queue, n)) for n in range(3))
        await asyncio.sleep(0.02)
        second.cancel()
        await asyncio.sleep(0)
        assert queue.depth == 2
        gate.opened.set()
        assert (await first, await third) == (0, 4)
    assert gate.batches == [[0], [2]]


async def test_a_failure_reaches_the_callers_of_its_batch() -> None:
    """An exception reaches the callers of its batch, and no others."""

    def fail_on_odd(batch: Sequence[int]) -> list[int]:
        if batch[0] % 2:
            raise ValueError("odd")
        return list(batch)

    async with DeviceThread() as thread, DeviceQueue[int, int](fail_on_odd, thread, max_waiting=4) as queue:
        results = await asyncio.gather(*(submit_number(queue, n) for n in range(4)), return_exceptions=True)
        assert results[0] == 0
        assert results[2] == 2
        assert isinstance(results[1], ValueError)
        assert queue.depth == 0


async def test_the_event_loop_is_not_blocked() -> None:
    """Other coroutines run while a batch is on the device."""
    gate = Gate()
    async with DeviceThread() as thread, DeviceQueue[int, int](gate, thread, max_waiting=1) as queue:
        call = asyncio.create_task(submit_number(queue, 1))
        for _ in range(10):
            await asyncio.sleep(0.001)
        assert not call.done()
        gate.opened.set()
        assert await call == 2


async def test_work_whose_deadline_has_passed_never_runs() -> None:
    """Of 20 items with a short deadline behind a long one none runs, and each fails at its deadline."""
    gate = Gate()

    async def late(number: int) -> None:
        with pytest.raises(DeadlineExceeded), queue.admit():
            await queue.submit(number, within_s=0.05)

    async with DeviceThread() as thread, DeviceQueue[int, int](gate, thread, max_waiting=30) as queue:
        first = asyncio.create_task(submit_number(queue, 1))
        await asyncio.gather(*(late(number) for number in range(2, 22)))
        assert not first.done()
        gate.opened.set()
        assert await first == 2
        assert await submit_number(queue, 30) == 60
    assert gate.batches == [[1], [30]]


async def test_work_with_the_same_key_joins_an_earlier_batch() -> None:
    """The next batch has the oldest item and those with the same key, wherever they are; None is never joined."""
    gate = Gate()
    keys = {0: None, 1: "odd", 2: "even", 3: "odd", 4: None, 5: "odd", 6: "even", 7: None}
    async with (
        DeviceThread() as thread,
        DeviceQueue[int, int](gate, thread, max_waiting=20, max_batch=2, key=keys.get) as queue,
    ):
        calls = [asyncio.create_task(submit_number(queue, number)) for number in keys]
        await asyncio.sleep(0.05)
        gate.opened.set()
        assert await asyncio.gather(*calls) == [2 * number for number in keys]
    assert gate.batches == [[0], [1, 3], [2, 6], [4], [5], [7]]


async def test_an_exception_as_a_result_reaches_only_its_caller() -> None:
    """The other items of the batch return their results."""

    def halve(batch: Sequence[int]) -> list[int | Exception]:
        return [ValueError("odd") if number % 2 else number // 2 for number in batch]

    async with (
        DeviceThread() as thread,
        DeviceQueue[int, int](halve, thread, max_waiting=4, max_batch=2, max_wait_s=0.02) as queue,
    ):
        odd, even = await asyncio.gather(submit_number(queue, 1), submit_number(queue, 4), return_exceptions=True)
    assert isinstance(odd, ValueError)
    assert even == 2
