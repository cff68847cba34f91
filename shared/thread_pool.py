"""Threads for one kind of blocking work, so that one kind never delays another."""

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Self, TypeVar

Result = TypeVar("Result")


class ThreadPool:
    """A few threads with a name. Enter it as a context; what runs at the end is waited for.

    Args:
        name: what the threads do.
        size: how many there are.
    """

    def __init__(self, name: str, size: int = 2) -> None:
        self._executor = ThreadPoolExecutor(size, thread_name_prefix=name)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self._executor.shutdown)

    async def run(self, function: Callable[..., Result], *args: Any) -> Result:
        """The result of ``function(*args)``, computed on one of the threads; its log lines carry the request's id."""
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self._executor, partial(context.run, function, *args))
