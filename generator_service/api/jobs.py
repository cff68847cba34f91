"""``/jobs``: generations that go on without their request, to be asked for, followed, fetched and cancelled."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi.responses import JSONResponse

from generator_service.api import events
from generator_service.api.generate import MAX_KEY_CHARS, as_json, delivered
from generator_service.api.schemas import GenerateRequest
from generator_service.api.state import GeneratorState, generator_state
from generator_service.jobs import Job
from shared.errors import JobNotFinished
from shared.web import owner_of, problem_of

router = APIRouter(prefix="/jobs")
State = Annotated[GeneratorState, Depends(generator_state)]


@router.post("", status_code=202)
async def begin(
    body: GenerateRequest,
    request: Request,
    state: State,
    idempotency_key: Annotated[str | None, Header(max_length=MAX_KEY_CHARS)] = None,
) -> Response:
    """Begin a job, or find the one that the same ``Idempotency-Key`` has begun."""
    job = await state.job(body, owner_of(request), idempotency_key)
    return JSONResponse(described(job, request), 202, {"location": f"/jobs/{job.id}"})


@router.get("/{job_id}")
async def show(job_id: str, request: Request, state: State) -> dict[str, Any]:
    """How far the job is."""
    return described(state.jobs.get(job_id, owner_of(request)), request)


@router.get("/{job_id}/result", response_class=Response)
async def result(job_id: str, request: Request, state: State, accept: Annotated[str, Header()] = "") -> Response:
    """The pictures, as ``POST /generate`` would have answered."""
    job = state.jobs.get(job_id, owner_of(request))
    if job.ended is None:
        raise JobNotFinished(f"the job is {job.status}", retry_after_s=job.order.estimate_s or 1.0)
    return delivered(await job.finished(), accept)


@router.get("/{job_id}/events", response_class=Response)
async def follow(job_id: str, request: Request, state: State) -> Response:
    """What has happened since the job began, then what happens, as server-sent events."""
    job = state.jobs.get(job_id, owner_of(request))
    return events.respond(request, events.native_events(job.follow(), job.num_steps, as_json))


@router.delete("/{job_id}")
async def cancel(job_id: str, request: Request, state: State) -> dict[str, Any]:
    """Stop the job within one step; one that has ended stays as it is."""
    job = state.jobs.get(job_id, owner_of(request))
    await job.cancel()
    return described(job, request)


def described(job: Job, request: Request) -> dict[str, Any]:
    """What is told of a job."""
    told: dict[str, Any] = {"id": job.id, "status": job.status, "seed": job.order.seed}
    if job.ended is None:
        told |= events.queued(job.queued) if job.queued else {}
        told |= {} if job.order.estimate_s is None else {"estimate_ms": round(1000 * job.order.estimate_s)}
    if job.error is not None:
        told["problem"] = problem_of(request, job.error).model_dump()
    return told
