"""The client's connection while a request is served."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that has left; only the metrics and logs show it."""
DISCONNECT_POLL_S = 0.1
Result = TypeVar("Result")


async def while_connected(
    request: Request, work: Coroutine[Any, Any, Result], on_end: Callable[[], None] | None = None
) -> Result | None:
    """Await ``work``; if the client disconnects first, cancel it and return None. Call ``on_end`` in any case."""
    task = asyncio.create_task(work)
    try:
        while not (await asyncio.wait([task], timeout=DISCONNECT_POLL_S))[0]:
            if await request.is_disconnected():
                return None
        return task.result()
    finally:
        task.cancel()
        if on_end is not None:
            on_end()
