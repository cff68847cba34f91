"""Request body of OpenAI's images API."""

import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictInt, model_validator

from flux2_shared.schemas import Text
from generator_service.api.schemas import GenerateRequest, Prompt, Sampling
from generator_service.engine.imaging import ImageFormat
from generator_service.errors import UnsupportedParameter

UNSUPPORTED = {
    "complexity": "not supported by this model",
    "frame_count": "animations are not supported by this model",
    "frame_duration_ms": "animations are not supported by this model",
    "markup": "not supported by this model; describe the change in the prompt",
    "mask": "not supported by this model; describe the change in the prompt",
    "svg": "vector graphics are not supported by this model",
}
"""Arguments of OpenAI's clients that cannot be served, with the reason."""
UNSUPPORTED_VALUES = {
    "background": ({"transparent"}, "images are opaque"),
    "output_format": ({"gif", "svg"}, "must be png, jpeg or webp"),
    "response_format": ({"url"}, "images are returned as b64_json only"),
}
FIELD_NAMES = {"width": "size", "height": "size", "num_images": "n", "previews": "partial_images", "images": "image"}
"""OpenAI's name for each field of the native API that has another one."""


class ImagesRequest(Sampling):
    """Body of ``/v1/images/generations``, and the text fields of ``/v1/images/edits``."""

    prompt: Prompt
    model: Text | None = None
    n: Annotated[StrictInt, Field(ge=1)] = 1
    size: Annotated[str, Field(pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$")] = "auto"
    output_format: ImageFormat = "png"
    output_compression: Annotated[StrictInt | None, Field(ge=0, le=100)] = None
    response_format: Literal["b64_json"] | None = None
    stream: StrictBool = False
    partial_images: Annotated[StrictInt, Field(ge=0, le=3)] = 0
    # Accepted for compatibility, and ignored.
    background: str | None = None
    input_fidelity: str | None = None
    moderation: str | None = None
    quality: str | None = None
    safety_identifier: str | None = None
    style: str | None = None
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        """Raise ``UnsupportedParameter``, which is not a ``ValueError``, so that clients get 400 as from OpenAI."""
        if not isinstance(data, dict):
            return data
        for name, reason in UNSUPPORTED.items():
            if data.get(name) is not None:
                raise UnsupportedParameter(f"{name}: {reason}", param=name)
        for name, (values, reason) in UNSUPPORTED_VALUES.items():
            if isinstance(data.get(name), str) and data[name] in values:
                raise UnsupportedParameter(f"{name}: {reason}, not {data[name]}", param=name)
        return {name: value for name, value in data.items() if name not in UNSUPPORTED}

    def native(self, images: Sequence[bytes] = ()) -> GenerateRequest:
        """Convert to the body of ``POST /generate``."""
        width, height = (None, None) if self.size == "auto" else map(int, self.size.split("x"))
        return GenerateRequest(
            **{name: getattr(self, name) for name in Sampling.model_fields},
            prompt=self.prompt,
            width=width,
            height=height,
            output_format=self.output_format,
            output_compression=self.output_compression,
            previews=self.partial_images,
            num_images=self.n,
            images=[base64.b64encode(data).decode() for data in images],
        )
