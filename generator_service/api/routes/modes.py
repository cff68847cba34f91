"""``GET /modes``: the cache modes, with computed steps and estimated time for an image."""

from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Depends, Query
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flux2_shared.errors import InvalidRequest
from flux2_shared.web.route import ServiceRoute
from generator_service.api.dependencies import GeneratorState, generator_state
from generator_service.api.references import check_size
from generator_service.api.schemas import MAX_IMAGES, GenerateRequest
from generator_service.engine.request import Request
from generator_service.lemica import PUBLISHED
from generator_service.pipelines.params import ReferenceSize
from generator_service.settings import GeneratorSettings

router = APIRouter(route_class=ServiceRoute)


SizeText = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$")]


class ModesQuery(BaseModel):
    """Size, steps and guidance of the image, and the sizes of its reference images as ``WIDTHxHEIGHT``.

    Defaults and limits are those of ``POST /generate``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: int | None = None
    height: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    images: Annotated[list[SizeText], Field(default_factory=list, max_length=MAX_IMAGES, fail_fast=True)]

    def sizes(self, settings: GeneratorSettings) -> list[ReferenceSize]:
        """Return the sizes of the reference images; raise ``InvalidRequest`` if they are outside the limits."""
        if len(self.images) > settings.max_references:
            limit = f"at most {settings.max_references}, not {len(self.images)}"
            raise InvalidRequest(f"images: {limit}", param="images")
        sizes = [ReferenceSize(*map(int, text.split("x"))) for text in self.images]
        for index, size in enumerate(sizes):
            check_size((size.width, size.height), f"images[{index}]", settings.max_reference_pixels)
        return sizes

    def request(self) -> GenerateRequest:
        """Convert to the body of ``POST /generate``.

        Raises:
            RequestValidationError: a field is outside its limits.
        """
        try:
            return GenerateRequest(prompt="-", **self.model_dump(exclude_none=True, exclude={"images"}))
        except ValidationError as error:
            raise RequestValidationError(error.errors()) from None


class Mode(BaseModel):
    """A cache mode for one kind of image."""

    name: str | int
    """The value for ``cache``."""
    computed: int
    total: int
    computed_steps: list[int]
    schedule: str
    """The schedule, as in the header ``x-schedule``."""
    estimate_ms: int | None
    """Estimated time of denoising and decoding; None until the first image was generated."""


class Defaults(BaseModel):
    """Default values of ``POST /generate``."""

    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    cache: str | int


class Modes(BaseModel):
    """The cache modes of the served model."""

    model: str
    default: Defaults
    modes: list[Mode]


@router.get("/modes")
async def modes(
    query: Annotated[ModesQuery, Query()], state: Annotated[GeneratorState, Depends(generator_state)]
) -> Modes:
    """List the cache modes with their estimated time for an image, and the defaults of this service."""
    sizes = query.sizes(state.settings)
    requests = await resolve_all_modes(query.request(), sizes, state)
    return Modes(
        model=state.engine.info.name, default=defaults(sizes, state), modes=[mode_of(request) for request in requests]
    )


def defaults(sizes: Sequence[ReferenceSize], state: GeneratorState) -> Defaults:
    """Return the defaults that ``Resolver`` fills in."""
    info, blank = state.engine.info, GenerateRequest(prompt="-", images=[])
    width, height = sizes[0].prepared(info.pixels_per_token) if sizes else (info.default_side, info.default_side)
    return Defaults(
        width=width,
        height=height,
        num_inference_steps=blank.num_inference_steps,
        guidance_scale=blank.guidance_scale,
        cache=state.settings.default_cache,
    )


async def resolve_all_modes(
    body: GenerateRequest, sizes: Sequence[ReferenceSize], state: GeneratorState
) -> list[Request]:
    """Resolve the request in every published mode and in the default mode."""
    requests = []
    for cache in dict.fromkeys(("none", *PUBLISHED, state.settings.default_cache)):
        try:
            in_mode = body.model_copy(update={"cache": cache})
            requests.append(await state.requests.run(state.resolver.resolve, in_mode, False, sizes))
        except InvalidRequest as error:
            if error.param != "cache":
                raise  # else the default is a schedule that does not fit this kind of image
    return requests


def mode_of(request: Request) -> Mode:
    params, estimate_s = request.params, request.estimate_s
    assert isinstance(params.cache, str | int)  # the modes above are not of the form max_error
    return Mode(
        name=params.cache,
        computed=params.schedule.num_computed,
        total=params.schedule.num_steps,
        computed_steps=list(params.schedule.computed_steps),
        schedule=str(params.schedule),
        estimate_ms=None if estimate_s is None else round(1000 * estimate_s),
    )
