"""The only thread of a service that uses its device."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence

import pytest
import torch

from flux2_shared.device.queue import DeviceQueue
from flux2_shared.device.thread import DeviceThread
from flux2_shared.errors import DeviceLost, OutOfMemory, ShuttingDown

pytestmark = pytest.mark.anyio

STICKY = [
    torch.AcceleratorError("CUDA error: device-side assert triggered\nSearch for `cudaErrorAssert'"),
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
]
ORDINARY = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x3 and 4x3)"),
    ValueError("CUDA error: device-side assert triggered"),
    torch.OutOfMemoryError("CUDA out of memory."),
    OutOfMemory("too large"),
]


def raiser(error: Exception) -> Callable[[], None]:
    """A function that raises ``error``."""

    def fail() -> None:
        raise error

    return fail


async def test_all_calls_run_on_one_thread() -> None:
    """Calls, and the batches of a queue, run one after the other on the same thread, outside the event loop's."""
    threads: list[int] = []

    def run(batch: Sequence[int]) -> Sequence[int]:
        threads.append(threading.get_ident())
        return batch

    async with DeviceThread() as thread, DeviceQueue[int, int](run, thread, max_waiting=4) as queue:
        threads.append(await thread.call(threading.get_ident))
        with queue.admit():
            await queue.submit(1)
        threads.append(await thread.call(threading.get_ident))
    assert len(threads) == 3
    assert set(threads) == {threads[0]} != {threading.get_ident()}


@pytest.mark.parametrize("error", STICKY, ids=str)
async def test_a_sticky_error_ends_the_thread(error: Exception) -> None:
    """After an error that leaves the device unusable every call is refused, and the owner is notified once."""
    lost: list[bool] = []
    async with DeviceThread(lambda: lost.append(True)) as thread:
        for _ in range(2):
            with pytest.raises(DeviceLost):
                await thread.call(raiser(error))
        with pytest.raises(DeviceLost):
            await thread.call(lambda: 1)
    assert lost == [True]


@pytest.mark.parametrize("error", ORDINARY, ids=str)
async def test_an_ordinary_error_does_not_end_the_thread(error: Exception) -> None:
    """Any other error reaches its caller, and the next call is served."""
    async with DeviceThread() as thread:
        with pytest.raises(type(error)):
            await thread.call(raiser(error))
        assert await thread.call(lambda: 1) == 1
        assert not thread.is_lost


@pytest.mark.parametrize("is_returned", [True, False])
async def test_all_work_ends_when_the_device_is_lost(is_returned: bool) -> None:
    """Running work, its batch and waiting work get ``DeviceLost``, and no new work is admitted."""
    ran: list[int] = []
    everyone_waits = threading.Event()

    def run(batch: Sequence[int]) -> list[int | Exception]:
        everyone_waits.wait(60)
        ran.extend(batch)
        if not is_returned:
            raise STICKY[0]
        return [STICKY[0], *batch[1:]]

    async with DeviceThread() as thread, DeviceQueue[int, int](run, thread, max_waiting=8, max_batch=2) as queue:

        async def submit_number(number: int) -> int:
            with queue.admit():
                return (await queue.submit(number)).value

        calls = [asyncio.create_task(submit_number(number)) for number in range(6)]
        await asyncio.sleep(0)  # each has submitted its work
        everyone_waits.set()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(result) for result in results] == [DeviceLost] * 6
        with pytest.raises(DeviceLost):
            await submit_number(7)
    assert ran == [0, 1]


async def test_closing_the_queue_ends_every_call() -> None:
    """Running and waiting work ends with ``ShuttingDown`` when the queue closes."""
    runs, may_end = threading.Event(), threading.Event()

    def run(batch: Sequence[int]) -> Sequence[int]:
        runs.set()
        may_end.wait(60)
        return batch

    async with DeviceThread() as thread:
        async with DeviceQueue[int, int](run, thread, max_waiting=8) as queue:

            async def submit_number(number: int) -> int:
                with queue.admit():
                    return (await queue.submit(number)).value

            calls = [asyncio.create_task(submit_number(number)) for number in range(3)]
            await asyncio.to_thread(runs.wait, 60)
        results = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 60)
        may_end.set()
    assert [type(result) for result in results] == [ShuttingDown] * 3


async def test_a_hanging_device_does_not_delay_the_shutdown() -> None:
    """Once the device is lost, the thread is not joined, since it may never return from the driver."""
    came_back = threading.Event()

    def hang() -> None:
        came_back.wait(60)

    async with DeviceThread() as thread:
        with pytest.raises(DeviceLost):
            await thread.call(raiser(STICKY[0]))
        thread._executor.submit(hang)
        began = time.monotonic()
    assert time.monotonic() - began < 30
    came_back.set()
