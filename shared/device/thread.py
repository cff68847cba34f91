"""The device thread: the only thread of a service that loads, checks, warms up and runs its model.

Each thread that computes with PyTorch starts its own OpenMP threads, which compete for the same cores, and CUDA's
current device is per thread. Everything that a service does with its model therefore runs on one thread.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self, TypeVar

import torch

from flux2_shared.device.errors import is_device_lost
from flux2_shared.errors import DeviceLost, Flux2Error
from flux2_shared.thread_pool import shut_down

Result = TypeVar("Result")


class DeviceThread:
    """Runs functions on one thread, one after the other, until the device is lost.

    After an error that leaves the CUDA context unusable (a "sticky" error) all calls are rejected, because only a new
    process gets a new context.

    Args:
        on_lost: called on the event loop, once, when the device is lost.
    """

    def __init__(self, on_lost: Callable[[], None] = lambda: None) -> None:
        self._on_lost = on_lost
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="device")
        self.is_lost = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.is_lost:
            self._executor.shutdown(wait=False, cancel_futures=True)  # the thread may hang in the driver
        else:
            await shut_down(self._executor)

    async def call(self, function: Callable[..., Result], *args: Any) -> Result:
        """Run ``function(*args)`` on the device thread and return its result.

        Raises:
            DeviceLost: this call or an earlier one left the device unusable.
        """
        if self.is_lost:
            raise DeviceLost
        loop = asyncio.get_running_loop()
        try:
            result = await loop.run_in_executor(self._executor, _checked, function, args)
        except DeviceLost:
            if not self.is_lost:
                self.is_lost = True
                self._on_lost()
            raise
        if self.is_lost:  # meanwhile
            raise DeviceLost
        return result

    def refuse_if_lost(self) -> None:
        if self.is_lost:
            raise DeviceLost


def refuse_lost_device(error: Exception) -> None:
    """Raise ``DeviceLost`` if ``error`` means that the device is lost. Call it on the device thread.

    Unknown errors are checked by synchronizing with the device: after a sticky error every call fails.
    """
    if is_device_lost(error):
        raise DeviceLost from error
    if isinstance(error, RuntimeError) and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        try:
            torch.cuda.synchronize()
        except RuntimeError as sticky_error:
            if is_device_lost(sticky_error):
                raise DeviceLost from error


def _checked(function: Callable[..., Result], args: tuple[Any, ...]) -> Result:
    try:
        return function(*args)
    except Flux2Error:
        raise
    except Exception as error:
        refuse_lost_device(error)
        raise
