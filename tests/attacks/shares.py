"""Attacks of one key on the others."""

import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.attacks.attack import Figures, attack
from tests.attacks.services import TINY, Service, both, client

ATTACKER, VICTIM = "a-key-of-the-attacker", "a-key-of-somebody-else"
LONG: dict[str, Any] = TINY | {"width": 128, "height": 128, "num_inference_steps": 100, "prompt": "a red circle"}


@asynccontextmanager
async def with_keys() -> AsyncIterator[Service]:
    """Both services, with two keys."""
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder, "keys")
        keys.write_text(f"{ATTACKER}\n{VICTIM}\n")
        async with both(GENERATOR_KEYS_FILE=str(keys)) as service:
            yield service


def of_key(service: Service, key: str) -> httpx.AsyncClient:
    """A client with a key."""
    service.keys = {"Authorization": f"Bearer {key}"}
    return client(service)


@attack(27, "cancelled jobs push results out")
async def cancelled_jobs(figures: Figures) -> None:
    """After 200 cancelled jobs of one key the results of another are still there."""
    async with with_keys() as service, of_key(service, ATTACKER) as attacker, of_key(service, VICTIM) as victim:
        started = await victim.post("/jobs", json=TINY | {"prompt": "a blue square"}, headers={"Idempotency-Key": "1"})
        job = started.json()["id"]
        while (await victim.get(f"/jobs/{job}")).json()["status"] in {"queued", "running"}:
            pass
        for k in range(200):
            response = await attacker.post("/jobs", json=LONG | {"seed": k})
            if response.status_code == httpx.codes.ACCEPTED:
                await attacker.delete(response.headers["location"])
        result = await victim.get(f"/jobs/{job}/result")
        again = await victim.post("/jobs", json=TINY | {"prompt": "a blue square"}, headers={"Idempotency-Key": "1"})
    figures.one_of("the other's result", result.status_code, (200,))
    figures.one_of("its idempotency key is known", again.json().get("id") == job, (True,))


@attack(27, "one key holds the queue")
async def held_queue(figures: Figures) -> None:
    """While one key queues long jobs, another's request is accepted and starts within one generation."""
    async with with_keys() as service, of_key(service, ATTACKER) as attacker, of_key(service, VICTIM) as victim:
        began = time.monotonic()
        await attacker.post("/generate", json=LONG)
        one_s = time.monotonic() - began
        statuses = [(await attacker.post("/jobs", json=LONG | {"seed": k})).status_code for k in range(12)]
        began = time.monotonic()
        response = await victim.post("/generate", json=TINY | {"prompt": "a blue square"})
        waited_s = time.monotonic() - began
    figures.at_least("long jobs accepted", statuses.count(202), 1)
    figures.one_of("the other's request", response.status_code, (200,))
    figures.at_most("served after", waited_s, 1.5 * one_s + 1, " s")
