"""Attacks with health probes."""

import asyncio
import time

from tests.attacks.attack import Figures, attack
from tests.attacks.services import Service, both, client, generate
from tests.attacks.traffic import connected, head

NUM_PROBES = 2000
ALL_ANSWERED_S = 5.0
PROMPT_S = 1.0


@attack(21, "flood of readiness probes")
async def flood_of_probes(figures: Figures) -> None:
    """2 000 simultaneous probes are all answered within 5 s, and a new prompt works within 1 s afterwards."""
    async with both() as service:
        async with client(service) as http:
            await generate(http, "a red circle")  # warm
        began = time.monotonic()
        statuses = await asyncio.gather(*(probe(service, k) for k in range(NUM_PROBES)))
        seconds = time.monotonic() - began
        async with client(service) as http:
            status, prompt_s = await generate(http, "a blue square")
    figures.at_most("probes without an answer", statuses.count(0), 0)
    figures.at_most("all answered after", seconds, ALL_ANSWERED_S, " s")
    figures.one_of("then a new prompt", status, (200,))
    figures.at_most("after", prompt_s, PROMPT_S, " s")


async def probe(service: Service, number: int) -> int:
    """The status of one probe; 0 without an answer."""
    try:
        async with connected(service, number) as connection:
            connection.writer.write(head("GET", "/health/ready", {"Connection": "close"}))
            return await connection.status(2 * ALL_ANSWERED_S)
    except OSError:
        return 0
