"""``/jobs``: generations that continue without an open request."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi.responses import JSONResponse

from flux2_shared.web.accept import preferred_type
from flux2_shared.web.problem import problem_of
from generator_service.api import sse
from generator_service.api.dependencies import GeneratorState, generator_state
from generator_service.api.responses import RESULT_TYPES, to_response
from generator_service.api.routes.generate import MAX_KEY_CHARS, NativeBody
from generator_service.api.routes.large_body import LargeBodyRoute
from generator_service.engine.job_store import Job
from generator_service.errors import JobNotFinished

router = APIRouter(prefix="/jobs", route_class=LargeBodyRoute)
State = Annotated[GeneratorState, Depends(generator_state)]


@router.post("", status_code=202)
async def begin(
    body: NativeBody,
    request: Request,
    state: State,
    idempotency_key: Annotated[str | None, Header(max_length=MAX_KEY_CHARS)] = None,
) -> Response:
    """Start a job, or return the one that was started with the same ``Idempotency-Key``.

    The body is that of ``POST /generate``.
    """
    job = await state.job(body, request.state.owner, idempotency_key)
    location = f"{request.scope['root_path']}/jobs/{job.id}"
    return JSONResponse(job_fields(job, request), 202, {"location": location})


@router.get("/{job_id}")
async def show(job_id: str, request: Request, state: State) -> dict[str, Any]:
    """Describe the status of a job."""
    return job_fields(state.jobs.get(job_id, request.state.owner), request)


@router.get("/{job_id}/result", response_class=Response)
async def result(job_id: str, request: Request, state: State) -> Response:
    """Return the images as ``POST /generate`` does."""
    generation = state.jobs.get(job_id, request.state.owner).generation
    if generation.is_wanted:
        retry_after_s = generation.request.estimate_s or 1.0
        raise JobNotFinished(f"the job is {generation.status}", retry_after_s=retry_after_s)
    media_type = preferred_type(request, RESULT_TYPES)
    return await to_response(generation.request, await generation.images(), media_type, state.responses)


@router.get("/{job_id}/events", response_class=Response)
async def follow(job_id: str, request: Request, state: State) -> Response:
    """Stream all events of the job from its start."""
    job = state.jobs.get(job_id, request.state.owner)
    return sse.stream(request, sse.native_events(job.generation, state.responses))


@router.delete("/{job_id}")
async def cancel(job_id: str, request: Request, state: State) -> dict[str, Any]:
    """Stop a job within one step. Does nothing if it has ended."""
    job = state.jobs.get(job_id, request.state.owner)
    job.generation.cancel()
    return job_fields(job, request)


def job_fields(job: Job, request: Request) -> dict[str, Any]:
    """Return the status and seed of a job, and its queue position or its error."""
    generation = job.generation
    params, estimate_s = generation.request.params, generation.request.estimate_s
    description: dict[str, Any] = {"id": job.id, "status": generation.status, "seed": params.seed}
    if generation.is_wanted:
        description |= sse.queue_fields(generation.queued) if generation.queued else {}
        description |= {} if estimate_s is None else {"estimate_ms": round(1000 * estimate_s)}
    if generation.error is not None:
        description["problem"] = problem_of(request, generation.error).model_dump()
    return description
