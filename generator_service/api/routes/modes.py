"""``GET /modes``: what a picture takes in each cache mode, for whoever has to choose one."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, ValidationError

from flux2_shared.errors import InvalidRequest
from generator_service.api.dependencies import GeneratorState, generator_state
from generator_service.api.schemas import GenerateRequest
from generator_service.engine.request import Request
from generator_service.lemica import PUBLISHED

router = APIRouter()


class ModesQuery(BaseModel):
    """The picture in question. What is left open is as ``POST /generate`` has it, and so are the limits."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: int | None = None
    height: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None

    def request(self) -> GenerateRequest:
        """The request for such a picture.

        Raises:
            RequestValidationError: a number is outside its limits.
        """
        try:
            return GenerateRequest(prompt="", **self.model_dump(exclude_none=True))
        except ValidationError as error:
            raise RequestValidationError(error.errors()) from None


class Mode(BaseModel):
    """A cache mode, and what it means for the picture."""

    name: str | int
    """What ``cache`` takes."""
    computed: int
    total: int
    computed_steps: list[int]
    schedule: str
    """As in the header ``x-schedule``."""
    estimate_ms: int | None
    """Denoising and decoding; None as long as nothing is known of the device's speed."""


class Defaults(BaseModel):
    """What holds for a request that leaves these open."""

    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    cache: str | int


class Modes(BaseModel):
    """The answer."""

    model: str
    default: Defaults
    modes: list[Mode]


@router.get("/modes")
async def modes(
    query: Annotated[ModesQuery, Query()], state: Annotated[GeneratorState, Depends(generator_state)]
) -> Modes:
    """What the picture takes in each cache mode, and the defaults of this service."""
    return Modes(
        model=state.engine.info.name,
        default=defaults(state),
        modes=[described(request) for request in await in_every_mode(query.request(), state)],
    )


def defaults(state: GeneratorState) -> Defaults:
    """As ``Resolver`` fills them in."""
    side, blank = state.engine.info.default_side, GenerateRequest(prompt="", images=[])
    return Defaults(
        width=side,
        height=side,
        num_inference_steps=blank.num_inference_steps,
        guidance_scale=blank.guidance_scale,
        cache=state.settings.default_cache,
    )


async def in_every_mode(body: GenerateRequest, state: GeneratorState) -> list[Request]:
    """The request in every mode, the service's default among them."""
    requests = []
    for cache in dict.fromkeys(("none", *PUBLISHED, state.settings.default_cache)):
        try:
            in_mode = body.model_copy(update={"cache": cache})
            requests.append(await state.requests.run(state.resolver.resolve, in_mode, False))
        except InvalidRequest as error:
            if error.param != "cache":
                raise  # else the default is a schedule that was not made for such a picture
    return requests


def described(request: Request) -> Mode:
    """The mode of ``request`` as JSON."""
    params, estimate_s = request.params, request.estimate_s
    assert isinstance(params.cache, str | int)  # none of the modes above is a bound of the error
    return Mode(
        name=params.cache,
        computed=params.schedule.num_computed,
        total=params.schedule.num_steps,
        computed_steps=list(params.schedule.computed_steps),
        schedule=str(params.schedule),
        estimate_ms=None if estimate_s is None else round(1000 * estimate_s),
    )
