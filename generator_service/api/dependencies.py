"""The state shared by the generator's routes, and the way from a request body to a generation."""

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
    """State created by the app's lifespan."""

    settings: GeneratorSettings
    engine: ImageGenerator
    resolver: Resolver
    jobs: JobStore
    requests: ThreadPool
    """Decodes and hashes request bodies."""
    images: ThreadPool
    """Decodes those with reference images, which take longer. There are as many full-size images as threads."""
    responses: ThreadPool
    """Encodes response bodies."""

    async def submit(self, body: GenerateRequest, owner: str, *, is_followed: bool) -> Generation:
        """Admit, resolve and submit a request of ``owner``.

        Raises:
            Busy: the queue is full; the body was not decoded.
            InvalidRequest: a field is outside its limits.
        """
        with self.engine.admit(owner, lambda: self._is_embedded(body)) as permit:
            threads = self.images if body.images else self.requests
            request = await threads.run(self.resolver.resolve, body, is_followed)
            return self.engine.submit(request, permit)

    def _is_embedded(self, body: GenerateRequest) -> bool:
        """Return whether a request does not need the text encoder."""
        if body.upsample_prompt:
            return False
        return body.prompt_embeds is not None or self.engine.is_cached(body.prompt or "")

    async def job(self, body: GenerateRequest, owner: str, key: str | None) -> Job:
        """Start a job, or return the one that was started with the same ``Idempotency-Key``.

        Raises:
            InvalidRequest: a field is outside its limits, or the key was used for another body.
            Busy: the queue is full.
        """
        fingerprint = await self.requests.run(digest, body) if key else ""
        async with self.jobs.lock(owner, key):
            job = self.jobs.repeated(owner, key, fingerprint)
            if job is None:
                job = Job(owner, await self.submit(body, owner, is_followed=True))
                self.jobs.add(job, key, fingerprint)
        return job


async def generator_state(request: HTTPRequest) -> GeneratorState:
    """Return the app's state; raise ``Starting`` until the lifespan has created it."""
    state: GeneratorState | None = getattr(request.app.state, "generator", None)
    if state is None:
        request.app.state.health.refuse_while_starting()
        raise AssertionError  # the state is set before the service reports that it serves
    return state


def digest(body: GenerateRequest) -> str:
    """Hash a request body."""
    return hashlib.sha256(body.model_dump_json().encode()).hexdigest()
