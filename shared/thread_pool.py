"""Thread pools for blocking work. Each kind of work has its own pool, so that one kind does not delay another.

Only name resolution uses the event loop's default executor: a silent name server occupies all of its threads.
"""

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Self, TypeVar

Result = TypeVar("Result")


class ThreadPool:
    """A named thread pool. Leaving its context waits for running work, and drops work that has not begun.

    Args:
        name: prefix of the threads' names.
        size: number of threads.
    """

    def __init__(self, name: str, size: int = 2) -> None:
        self._executor = ThreadPoolExecutor(size, thread_name_prefix=name)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await shut_down(self._executor)

    async def run(self, function: Callable[..., Result], *args: Any) -> Result:
        """Run ``function(*args)`` on one of the threads, in the caller's context, and return its result."""
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self._executor, partial(context.run, function, *args))

    def submit(self, function: Callable[..., Result], *args: Any) -> Future[Result]:
        """Run ``function(*args)`` on one of the threads; may be called from any thread."""
        return self._executor.submit(function, *args)


async def shut_down(executor: ThreadPoolExecutor) -> None:
    """Drop an executor's waiting work, and wait for the work that runs.

    The default executor is not used for this, because its threads may wait for a name server.
    """
    closer = ThreadPoolExecutor(1, thread_name_prefix="shutdown")
    await asyncio.get_running_loop().run_in_executor(closer, partial(executor.shutdown, cancel_futures=True))
    closer.shutdown(wait=False)
