"""Stores jobs, which outlive their HTTP request. The store is bounded in number, bytes and age."""

import asyncio
import secrets
import time
from collections import defaultdict
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

    @property
    def num_bytes(self) -> int:
        """Size of the results."""
        return self.generation.num_bytes


class JobStore:
    """The jobs of all clients; a client can access only its own, and its jobs do not displace those of others.

    Args:
        max_jobs: largest number of ended jobs of one owner. Those without results are dropped first.
        max_bytes: largest total size of results. The owner with the most bytes loses its oldest job first.
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
        return sum(job.num_bytes for job in self._jobs.values())

    def close(self) -> None:
        """Cancel all jobs."""
        for job in self._jobs.values():
            job.generation.cancel()

    def _forget_old(self) -> None:
        """Drop ended jobs that have expired, or are too many of one owner, or too large together."""
        oldest_allowed = time.monotonic() - self._ttl_s
        ended = [job for job in self._jobs.values() if job.generation.ended is not None]
        ended.sort(key=lambda job: (job.num_bytes > 0, job.generation.ended))  # the first are dropped first
        kept: dict[str, list[Job]] = defaultdict(list)
        for job in ended:
            if job.generation.ended is not None and job.generation.ended >= oldest_allowed:
                kept[job.owner].append(job)
        for jobs in kept.values():
            del jobs[: max(0, len(jobs) - self._max_jobs)]
        self._bound_bytes(kept)
        dropped = {job.id for job in ended} - {job.id for jobs in kept.values() for job in jobs}
        for job_id in dropped:
            del self._jobs[job_id]
        self._keys = {key: entry for key, entry in self._keys.items() if entry[1] in self._jobs}

    def _bound_bytes(self, kept: dict[str, list[Job]]) -> None:
        """Remove jobs from the lists of their owners until the results are small enough together."""
        sizes = {owner: sum(job.num_bytes for job in jobs) for owner, jobs in kept.items()}
        while sum(sizes.values()) > self._max_bytes:
            owner = max(sizes, key=lambda each: sizes[each])
            oldest = next(job for job in kept[owner] if job.num_bytes > 0)
            kept[owner].remove(oldest)
            sizes[owner] -= oldest.num_bytes
