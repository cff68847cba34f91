"""Stores jobs, which outlive their HTTP request. The store is bounded in number, bytes and age."""

import asyncio
import secrets
import time
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from flux2_shared.errors import InvalidRequest
from generator_service.engine.generation import Generation
from generator_service.errors import JobNotFound


@dataclass(frozen=True)
class Job:
    """A generation that its owner can access by id."""

    owner: str
    generation: Generation
    id: str = field(default_factory=lambda: secrets.token_hex(16))


class JobStore:
    """The jobs of all clients; a client can access only its own.

    Args:
        max_jobs: largest number of ended jobs.
        max_bytes: largest total size of their results.
        ttl_s: time an ended job is kept, in seconds.
    """

    def __init__(self, *, max_jobs: int, max_bytes: int, ttl_s: float) -> None:
        self._max_jobs = max_jobs
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._jobs: dict[str, Job] = {}
        self._locks: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()
        self._keys: dict[tuple[str, str], tuple[str, str]] = {}

    def add(self, job: Job, key: str | None, fingerprint: str) -> None:
        """Store a job. ``key`` is the client's ``Idempotency-Key``, ``fingerprint`` a hash of the request body."""
        self._forget_old()
        self._jobs[job.id] = job
        if key is not None:
            self._keys[job.owner, key] = (fingerprint, job.id)

    def get(self, job_id: str, owner: str) -> Job:
        """Return a job.

        Raises:
            JobNotFound: there is no such job, it has expired, or it belongs to another client.
        """
        self._forget_old()
        job = self._jobs.get(job_id)
        if job is None or job.owner != owner:
            raise JobNotFound("the job does not exist or has expired")
        return job

    def repeated(self, owner: str, key: str | None, fingerprint: str) -> Job | None:
        """Return the job of an earlier request with the same ``key``, if it is still stored.

        Raises:
            InvalidRequest: the earlier request had another body.
        """
        self._forget_old()
        if key is None or (owner, key) not in self._keys:
            return None
        original, job_id = self._keys[owner, key]
        if original != fingerprint:
            raise InvalidRequest("Idempotency-Key: was used for another request", param="Idempotency-Key")
        return self._jobs[job_id]

    def lock(self, owner: str, key: str | None) -> asyncio.Lock:
        """Return a lock to hold from ``repeated`` to ``add``, so that concurrent requests start one job."""
        return asyncio.Lock() if key is None else self._locks.setdefault((owner, key), asyncio.Lock())

    @property
    def num_jobs(self) -> int:
        """Number of jobs that are kept."""
        return len(self._jobs)

    @property
    def num_bytes(self) -> int:
        """Size of the results of all jobs."""
        return sum(job.generation.num_bytes for job in self._jobs.values())

    def close(self) -> None:
        """Cancel all jobs."""
        for job in self._jobs.values():
            job.generation.cancel()

    def _forget_old(self) -> None:
        generations = {job.id: job.generation for job in self._jobs.values()}
        ended = sorted((each.ended, job_id) for job_id, each in generations.items() if each.ended is not None)
        kept_bytes = sum(generations[job_id].num_bytes for _, job_id in ended)
        oldest_allowed = time.monotonic() - self._ttl_s
        for position, (when, job_id) in enumerate(ended):
            is_over = len(ended) - position > self._max_jobs or kept_bytes > self._max_bytes
            if is_over or when < oldest_allowed:
                kept_bytes -= self._jobs.pop(job_id).generation.num_bytes
        self._keys = {key: entry for key, entry in self._keys.items() if entry[1] in self._jobs}
