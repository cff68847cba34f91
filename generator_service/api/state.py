"""What the generator's routes have in common: the state behind them, and how a body becomes an order or a job."""

import asyncio
import hashlib
from dataclasses import dataclass
from functools import partial

from fastapi import Request

from generator_service.api.schemas import GenerateRequest
from generator_service.engine import PictureMaker
from generator_service.jobs import Job, JobStore
from generator_service.lemica import Shelf
from generator_service.order import Order, make_order
from generator_service.progress import Progress
from generator_service.settings import GeneratorSettings


@dataclass(frozen=True)
class GeneratorState:
    """What the lifespan of the app owns."""

    settings: GeneratorSettings
    engine: PictureMaker
    shelf: Shelf
    jobs: JobStore
    embedding_shape: tuple[int, int]
    """Tokens and width of a prompt embedding."""

    async def order(self, body: GenerateRequest) -> Order:
        """The body, checked and complete.

        Raises:
            InvalidRequest: a field is outside its limits; the error names it.
        """
        engine = self.engine
        return await asyncio.to_thread(
            make_order, body, self.settings, engine.card, self.shelf, self.embedding_shape, engine.cost.of
        )

    async def job(self, body: GenerateRequest, owner: str, key: str | None) -> Job:
        """A job for the body, or the one that the same ``Idempotency-Key`` has begun.

        Raises:
            InvalidRequest: a field is outside its limits, or the key was used for another body.
            Busy: the queue is full; nothing was begun.
        """
        fingerprint = await asyncio.to_thread(digest, body) if key else ""
        job = self.jobs.repeated(owner, key, fingerprint)
        if job is not None:
            return job
        order = await self.order(body)
        async with self.jobs.beginning:  # the same request may have come meanwhile
            job = self.jobs.repeated(owner, key, fingerprint)
            if job is None:
                deliver = partial(self.engine.deliver, order.siblings(body.num_images))
                job = Job(owner, order, await Progress.start(deliver))
                self.jobs.add(job, key, fingerprint)
        return job


async def generator_state(request: Request) -> GeneratorState:
    """The state that the lifespan made; raises ``Starting`` while there is none."""
    request.app.state.health.refuse_while_starting()
    state: GeneratorState = request.app.state.generator
    return state


def digest(body: GenerateRequest) -> str:
    """The same for the same request."""
    return hashlib.sha256(body.model_dump_json().encode()).hexdigest()
