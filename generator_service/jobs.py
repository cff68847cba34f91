"""Generations that outlive the request that asked for them, in a store bounded in number, bytes and age."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator
from enum import StrEnum

from generator_service.engine import Delivery
from generator_service.happenings import Happening, Preview, StepBegun
from generator_service.line import Queued
from generator_service.order import Order
from generator_service.progress import Progress
from shared.errors import Flux2Error, InvalidRequest, JobCancelled, JobNotFound

logger = logging.getLogger("flux2")

CANCELLED = "this job was cancelled"


class JobStatus(StrEnum):
    """How far a job is."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Job:
    """One generation: what has happened so far, for anybody who asks, and what came out."""

    def __init__(self, owner: str, order: Order, progress: Progress) -> None:
        self.id = secrets.token_hex(16)
        self.owner = owner
        self.order = order
        self.status = JobStatus.QUEUED
        self.deliveries: list[Delivery] = []
        self.error: Flux2Error | None = None
        self.ended: float | None = None
        self._history: list[Happening | Delivery | None] = []
        self._changed = asyncio.Event()
        self._progress = progress
        self._task = asyncio.create_task(self._run())

    @property
    def num_bytes(self) -> int:
        """What its results take."""
        return sum(len(delivery.data) + len(delivery.side_by_side) for delivery in self.deliveries)

    @property
    def queued(self) -> Queued | None:
        """Its place in the line."""
        return self._progress.queued

    async def cancel(self) -> None:
        """Stop it, within one step; what has ended stays as it is."""
        self._progress.cancel()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if self.ended is None:  # it had not even begun
            self._end(JobStatus.CANCELLED, JobCancelled(CANCELLED))

    @property
    def num_steps(self) -> int:
        """Of each of its pictures."""
        return self.order.schedule.num_steps

    async def finished(self) -> list[Delivery]:
        """Its pictures, once they are there.

        Raises:
            JobCancelled: somebody did.
            Flux2Error: what it failed with.
        """
        async for _event in self.follow():
            pass
        return self.deliveries

    async def follow(self) -> AsyncIterator[Happening | Delivery]:
        """Everything from the start, then what happens as it does.

        Raises:
            JobCancelled: somebody did.
            Flux2Error: what it failed with.
        """
        position = 0
        while True:
            changed = self._changed
            while position < len(self._history):
                event = self._history[position]
                position += 1
                if event is not None:
                    yield event
            if self.ended is not None:
                break
            await changed.wait()
        if self.error is not None:
            raise self.error

    async def _run(self) -> None:
        try:
            async for event in self._progress:
                if isinstance(event, StepBegun):
                    self.status = JobStatus.RUNNING
                self._history.append(event)
                self._tell()
        except asyncio.CancelledError:
            self._end(JobStatus.CANCELLED, JobCancelled(CANCELLED))
        except Flux2Error as error:
            self._end(JobStatus.FAILED, error)
        except Exception:
            logger.exception("a job failed")
            self._end(JobStatus.FAILED, Flux2Error("an internal error; the job's id tells the operator more"))
        else:
            self._end(JobStatus.COMPLETED)

    def _end(self, status: JobStatus, error: Flux2Error | None = None) -> None:
        self.deliveries = [event for event in self._history if isinstance(event, Delivery)]
        # What is large or past goes: a job is kept for long. Who follows it keeps count, so the places stay.
        self._history = [None if isinstance(event, Preview | Queued) else event for event in self._history]
        self.order = self.order.without_inputs()
        self.status, self.error, self.ended = status, error, time.monotonic()
        self._tell()

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class JobStore:
    """The jobs of all clients. Each sees only its own.

    Args:
        max_jobs: how many ended jobs are kept.
        max_bytes: how much their results may take together.
        ttl_s: how long a job is kept after its end.
    """

    def __init__(self, *, max_jobs: int, max_bytes: int, ttl_s: float) -> None:
        self._max_jobs = max_jobs
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._jobs: dict[str, Job] = {}
        self.beginning = asyncio.Lock()
        """Held while a job is begun, so that a repetition cannot begin it twice."""
        self._keys: dict[tuple[str, str], tuple[str, str]] = {}

    def add(self, job: Job, key: str | None, fingerprint: str) -> None:
        """Keep ``job``; a repetition of its request finds it by ``key``, the client's ``Idempotency-Key``."""
        self._forget_old()
        self._jobs[job.id] = job
        if key is not None:
            self._keys[job.owner, key] = (fingerprint, job.id)

    def get(self, job_id: str, owner: str) -> Job:
        """The job.

        Raises:
            JobNotFound: there is none, it was forgotten, or it is somebody else's.
        """
        self._forget_old()
        job = self._jobs.get(job_id)
        if job is None or job.owner != owner:
            raise JobNotFound("there is no such job, or no more")
        return job

    def repeated(self, owner: str, key: str | None, fingerprint: str) -> Job | None:
        """The job that a request with the same ``key`` began, if it is still known.

        Raises:
            InvalidRequest: that request was another one.
        """
        self._forget_old()
        if key is None or (owner, key) not in self._keys:
            return None
        known, job_id = self._keys[owner, key]
        if known != fingerprint:
            raise InvalidRequest("Idempotency-Key: was used for another request", param="Idempotency-Key")
        return self._jobs[job_id]

    async def close(self) -> None:
        """Stop what still runs."""
        await asyncio.gather(*(job.cancel() for job in self._jobs.values()))

    def _forget_old(self) -> None:
        ended = sorted((job.ended, job.id) for job in self._jobs.values() if job.ended is not None)
        kept_bytes = sum(self._jobs[job_id].num_bytes for _, job_id in ended)
        oldest_allowed = time.monotonic() - self._ttl_s
        for position, (when, job_id) in enumerate(ended):
            is_over = len(ended) - position > self._max_jobs or kept_bytes > self._max_bytes
            if is_over or when < oldest_allowed:
                kept_bytes -= self._jobs.pop(job_id).num_bytes
        self._keys = {key: known for key, known in self._keys.items() if known[1] in self._jobs}
