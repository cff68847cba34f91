"""What the generator's routes have in common: the state behind them, and how a body becomes a generation."""

import hashlib
from dataclasses import dataclass

from fastapi import Request

from generator_service.api.schemas import GenerateRequest
from generator_service.engine.engine import ImageGenerator
from generator_service.engine.generation import Generation
from generator_service.engine.job_store import Job, JobStore
from generator_service.engine.queue import Permit
from generator_service.lemica import ScheduleRegistry
from generator_service.order import Order, make_order
from generator_service.settings import GeneratorSettings
from shared.thread_pool import ThreadPool


@dataclass(frozen=True)
class GeneratorState:
    """What the lifespan of the app owns."""

    settings: GeneratorSettings
    engine: ImageGenerator
    registry: ScheduleRegistry
    jobs: JobStore
    embedding_shape: tuple[int, int]
    """Tokens and width of a prompt embedding."""
    pool: ThreadPool
    """Decodes and hashes what clients send."""

    async def order(self, body: GenerateRequest) -> Order:
        """The body, checked and complete.

        Raises:
            InvalidRequest: a field is outside its limits; the error names it.
        """
        engine = self.engine
        return await self.pool.run(
            make_order, body, self.settings, engine.card, self.registry, self.embedding_shape, engine.cost.of
        )

    async def submit(self, body: GenerateRequest, *, is_followed: bool) -> Generation:
        """Begin to generate what the body asks for.

        Raises:
            Busy: the queue is full; nothing of the body was decoded.
            InvalidRequest: a field is outside its limits.
        """
        with self.engine.admit() as permit:
            return self.submit_order(body, await self.order(body), permit, is_followed=is_followed)

    def submit_order(self, body: GenerateRequest, order: Order, permit: Permit, *, is_followed: bool) -> Generation:
        """Begin to generate the images of ``order``, as many as the body asks for."""
        return self.engine.submit(order.siblings(body.num_images), permit, is_followed=is_followed)

    async def job(self, body: GenerateRequest, owner: str, key: str | None) -> Job:
        """A job for the body, or the one that the same ``Idempotency-Key`` has begun.

        Raises:
            InvalidRequest: a field is outside its limits, or the key was used for another body.
            Busy: the queue is full; nothing was begun.
        """
        fingerprint = await self.pool.run(digest, body) if key else ""
        async with self.jobs.lock(owner, key):
            job = self.jobs.repeated(owner, key, fingerprint)
            if job is None:
                job = Job(owner, await self.submit(body, is_followed=True))
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
