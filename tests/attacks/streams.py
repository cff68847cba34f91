"""Attacks of readers that do not read."""

import asyncio
from contextlib import AsyncExitStack
from typing import Any

from flux2_shared.web.server import KEEP_ALIVE_S
from tests.attacks.attack import Figures, attack
from tests.attacks.services import TINY, Service, both, client, watching
from tests.attacks.traffic import connected, head

NUM_READERS = 20
GONE_S = KEEP_ALIVE_S + 15.0
"""The kernel may hold all events of a stream, so that only the connection is left unread."""
JOB: dict[str, Any] = TINY | {
    "prompt": "a red circle",
    "width": 512,
    "height": 512,
    "num_inference_steps": 12,
    "previews": 10,
    "num_images": 2,
}


@attack(29, "readers that stop reading")
async def idle_readers(figures: Figures) -> None:
    """20 streams with previews that nobody reads grow the memory by less than 100 MB, and are closed in time."""
    async with both() as service, client(service) as http:
        await http.post("/generate", json={name: value for name, value in JOB.items() if name != "previews"})
        before = service.num_connections()
        async with watching(service) as watch, AsyncExitStack() as stack:
            job = (await http.post("/jobs", json=JOB)).json()["id"]
            for k in range(NUM_READERS):
                reader = await stack.enter_async_context(connected(service, k, limit=1))
                reader.writer.write(head("GET", f"/jobs/{job}/events", {"Accept": "text/event-stream"}))
                reader.writer.transport.pause_reading()  # type: ignore[attr-defined]
            while (await http.get(f"/jobs/{job}")).json()["status"] in {"queued", "running"}:
                await asyncio.sleep(0.2)
            left = await connections_after(service, before)
    figures.at_most("growth", watch.growth, 100, " MiB")
    figures.at_most(f"streams open {GONE_S:.0f} s after the end", left, 0)
    figures.at_most("live p99", watch.live(0.99), 0.25, " s")


async def connections_after(service: Service, before: int) -> int:
    """The connections more than ``before`` that stay open."""
    for _ in range(int(GONE_S * 2)):
        left = service.num_connections() - before
        if left <= 0:
            return 0
        await asyncio.sleep(0.5)
    return left
