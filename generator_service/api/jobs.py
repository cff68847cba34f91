"""``/jobs``: generations that go on without their request, to be asked for, followed, fetched and cancelled."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi.responses import JSONResponse

from generator_service.api import events
from generator_service.api.generate import MAX_KEY_CHARS, native_events, to_response
from generator_service.api.schemas import GenerateRequest
from generator_service.api.state import GeneratorState, generator_state
from generator_service.engine.job_store import Job
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
    generation = state.jobs.get(job_id, owner_of(request)).generation
    if generation.is_wanted:
        told = f"the job is {generation.status}"
        raise JobNotFinished(told, retry_after_s=generation.orders[0].estimate_s or 1.0)
    return to_response(await generation.images(), accept)


@router.get("/{job_id}/events", response_class=Response)
async def follow(job_id: str, request: Request, state: State) -> Response:
    """What has happened since the job began, then what happens, as server-sent events."""
    job = state.jobs.get(job_id, owner_of(request))
    return events.respond(request, native_events(job.generation))


@router.delete("/{job_id}")
async def cancel(job_id: str, request: Request, state: State) -> dict[str, Any]:
    """Stop the job within one step; one that has ended stays as it is."""
    job = state.jobs.get(job_id, owner_of(request))
    job.generation.cancel()
    return described(job, request)


def described(job: Job, request: Request) -> dict[str, Any]:
    """What is told of a job."""
    generation = job.generation
    order = generation.orders[0]
    description: dict[str, Any] = {"id": job.id, "status": generation.status, "seed": order.seed}
    if generation.is_wanted:
        description |= events.queued(generation.queued) if generation.queued else {}
        description |= {} if order.estimate_s is None else {"estimate_ms": round(1000 * order.estimate_s)}
    if generation.error is not None:
        description["problem"] = problem_of(request, generation.error).model_dump()
    return description
