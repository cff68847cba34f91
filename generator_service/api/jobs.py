"""``/jobs``: generations that go on without their request, to be asked for, followed, fetched and cancelled."""

import asyncio
import hashlib
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi.responses import JSONResponse

from generator_service.api import events
from generator_service.api.generate import GeneratorState, as_json, delivered, generator_state
from generator_service.api.schemas import GenerateRequest
from generator_service.jobs import Job, JobStatus
from generator_service.order import make_order
from generator_service.progress import Progress
from shared.errors import JobNotFinished
from shared.web import owner_of, problem_of

router = APIRouter(prefix="/jobs")
State = Annotated[GeneratorState, Depends(generator_state)]
MAX_KEY_CHARS = 255


@router.post("", status_code=202)
async def begin(
    body: GenerateRequest,
    request: Request,
    state: State,
    idempotency_key: Annotated[str | None, Header(max_length=MAX_KEY_CHARS)] = None,
) -> Response:
    """Begin a job, or find the one that the same ``Idempotency-Key`` has begun."""
    owner = owner_of(request)
    fingerprint = await asyncio.to_thread(digest, body) if idempotency_key else ""
    job = state.jobs.repeated(owner, idempotency_key, fingerprint)
    if job is None:
        order = await asyncio.to_thread(
            make_order,
            body,
            state.settings,
            state.engine.model,
            state.shelf,
            state.embedding_shape,
            state.engine.cost.of,
        )
        async with state.jobs.beginning:  # the same request may have come meanwhile
            job = state.jobs.repeated(owner, idempotency_key, fingerprint)
            if job is None:
                deliver = partial(state.engine.deliver, order.siblings(body.num_images))
                job = Job(owner, order, await Progress.start(deliver))
                state.jobs.add(job, idempotency_key, fingerprint)
    return JSONResponse(described(job, request, state), 202, {"location": f"/jobs/{job.id}"})


def digest(body: GenerateRequest) -> str:
    """The same for the same request."""
    return hashlib.sha256(body.model_dump_json().encode()).hexdigest()


@router.get("/{job_id}")
async def show(job_id: str, request: Request, state: State) -> dict[str, Any]:
    """How far the job is."""
    return described(state.jobs.get(job_id, owner_of(request)), request, state)


@router.get("/{job_id}/result", response_class=Response)
async def result(job_id: str, request: Request, state: State, accept: Annotated[str, Header()] = "") -> Response:
    """The pictures, as ``POST /generate`` would have answered."""
    job = state.jobs.get(job_id, owner_of(request))
    if job.error is not None:
        raise job.error
    if job.ended is None:
        raise JobNotFinished(f"the job is {job.status}", retry_after_s=job.order.estimate_s or 1.0)
    return delivered(job.deliveries, accept)


@router.get("/{job_id}/events", response_class=Response)
async def follow(job_id: str, request: Request, state: State) -> Response:
    """What has happened since the job began, then what happens, as server-sent events."""
    job = state.jobs.get(job_id, owner_of(request))
    queued = {"position": state.jobs.position(job)} if job.status == JobStatus.QUEUED else None
    told = events.native_events(job.follow(), job.order.schedule.num_steps, as_json, queued)
    return events.respond(request, told)


@router.delete("/{job_id}")
async def cancel(job_id: str, request: Request, state: State) -> dict[str, Any]:
    """Stop the job within one step; one that has ended stays as it is."""
    job = state.jobs.get(job_id, owner_of(request))
    await job.cancel()
    return described(job, request, state)


def described(job: Job, request: Request, state: GeneratorState) -> dict[str, Any]:
    """What is told of a job."""
    told: dict[str, Any] = {"id": job.id, "status": job.status, "seed": job.order.seed}
    if job.ended is None:
        told["position"] = state.jobs.position(job)
        if job.order.estimate_s is not None:
            told["estimate_ms"] = round(1000 * job.order.estimate_s)
    if job.error is not None:
        told["problem"] = problem_of(request, job.error).model_dump()
    return told
