"""What the generator's routes have in common: the state behind them, and how a body becomes a generation."""

import hashlib
from dataclasses import dataclass

from fastapi import Request as HTTPRequest

from flux2_shared.thread_pool import ThreadPool
from generator_service.api.resolve import Resolver
from generator_service.api.schemas import GenerateRequest
from generator_service.engine.engine import ImageGenerator
from generator_service.engine.generation import Generation
from generator_service.engine.job_store import Job, JobStore
from generator_service.settings import GeneratorSettings


@dataclass(frozen=True)
class GeneratorState:
    """What the lifespan of the app owns."""

    settings: GeneratorSettings
    engine: ImageGenerator
    resolver: Resolver
    jobs: JobStore
    requests: ThreadPool
    """Decodes and hashes what clients send."""
    responses: ThreadPool
    """Encodes what clients receive."""

    async def submit(self, body: GenerateRequest, *, is_followed: bool) -> Generation:
        """Begin to generate what the body asks for.

        Raises:
            Busy: the queue is full; nothing of the body was decoded.
            InvalidRequest: a field is outside its limits.
        """
        with self.engine.admit() as permit:
            request = await self.requests.run(self.resolver.resolve, body, is_followed)
            return self.engine.submit(request, permit)

    async def job(self, body: GenerateRequest, owner: str, key: str | None) -> Job:
        """A job for the body, or the one that the same ``Idempotency-Key`` has begun.

        Raises:
            InvalidRequest: a field is outside its limits, or the key was used for another body.
            Busy: the queue is full; nothing was begun.
        """
        fingerprint = await self.requests.run(digest, body) if key else ""
        async with self.jobs.lock(owner, key):
            job = self.jobs.repeated(owner, key, fingerprint)
            if job is None:
                job = Job(owner, await self.submit(body, is_followed=True))
                self.jobs.add(job, key, fingerprint)
        return job


async def generator_state(request: HTTPRequest) -> GeneratorState:
    """The state that the lifespan made; raises ``Starting`` while there is none."""
    state: GeneratorState | None = getattr(request.app.state, "generator", None)
    if state is None:
        request.app.state.health.refuse_while_starting()
        raise AssertionError  # the state is there before the service says that it serves
    return state


def digest(body: GenerateRequest) -> str:
    """The same for the same request."""
    return hashlib.sha256(body.model_dump_json().encode()).hexdigest()
