"""Attacks with connections that do nothing, slowly."""

import asyncio
import contextlib
from contextlib import AsyncExitStack

from tests.attacks.attack import Figures, attack
from tests.attacks.services import generator, watching
from tests.attacks.traffic import Connection, connected, head

NUM_SLOW, NUM_FILES = 500, 256
CLOSED_S = 60.0
LOG_BYTES = 100_000


@attack(28, "slow heads and bodies")
async def slow_connections(figures: Figures) -> None:
    """500 slow connections under a limit of 256 descriptors are closed in time; health answers, the log stays short."""
    async with generator(files=NUM_FILES) as target:
        async with watching(target) as watch, AsyncExitStack() as stack:
            opened = []
            for k in range(NUM_SLOW):
                with contextlib.suppress(OSError):
                    opened.append(await stack.enter_async_context(connected(target, k)))
            dripping = [asyncio.create_task(drip(each, k)) for k, each in enumerate(opened)]
            deadline = asyncio.get_running_loop().time() + CLOSED_S
            closed = await asyncio.gather(*(each.is_closed(deadline) for each in opened))
            for each in dripping:
                each.cancel()
        log_bytes = target.log.stat().st_size
    figures.at_most("live at worst", watch.live(1.0), 1.0, " s")
    figures.at_most(f"not closed within {CLOSED_S:.0f} s", closed.count(False), 0)
    figures.at_most("log", log_bytes, LOG_BYTES, " bytes")


async def drip(connection: Connection, number: int) -> None:
    """Send a head, or the body after it, one byte at a time."""
    slowly = {"Content-Type": "application/json", "Content-Length": "1000"}
    with contextlib.suppress(OSError):
        if number % 2:
            connection.writer.write(head("POST", "/generate", slowly))
        else:
            connection.writer.write(b"GET /health/live HTTP/1.1\r\nX-Slow: ")
        while not connection.writer.is_closing():
            connection.writer.write(b" ")
            await connection.writer.drain()
            await asyncio.sleep(1)
