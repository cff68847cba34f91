"""Hugging Face's inference API, for ``text_to_image`` and ``image_to_image`` of ``InferenceClient(model=url)``."""

import re
from typing import Any

from pydantic import Field, StrictInt

from flux2_shared.errors import InvalidRequest
from flux2_shared.schemas import Text
from generator_service.api.schemas import GenerateRequest, Prompt, RequestBody, Sampling
from generator_service.errors import UnsupportedParameter

ENCODED_FILE = re.compile(r"\s*(data:|[A-Z0-9+/_=-]([\r\n]*[A-Z0-9+/_=-]){79})", re.ASCII | re.IGNORECASE)
"""The start of a data URI, or of base64: more characters without a space than any word has."""


class TargetSize(RequestBody):
    """Size of an edited image."""

    width: StrictInt
    height: StrictInt


class Parameters(Sampling):
    """Optional parameters of a request."""

    prompt: Prompt | None = None
    width: StrictInt | None = None
    height: StrictInt | None = None
    target_size: TargetSize | None = None
    negative_prompt: Text | None = None
    scheduler: Text | None = None


class InferenceRequest(RequestBody):
    """``inputs`` is the prompt, or, with ``parameters.prompt``, the image to edit as base64."""

    inputs: Prompt
    parameters: Parameters = Field(default_factory=Parameters)
    options: dict[str, Any] | None = None

    @property
    def field_names(self) -> dict[str, str]:
        """This API's name for each field of the native one that has another one."""
        prompt = {"prompt": "inputs"} if self.parameters.prompt is None else {"images[0]": "inputs"}
        size = {} if self.parameters.target_size is None else dict.fromkeys(("width", "height"), "target_size")
        return prompt | size

    def native(self) -> GenerateRequest:
        """Convert to the body of ``POST /generate``.

        Raises:
            UnsupportedParameter: ``negative_prompt`` or ``scheduler`` is set, which FLUX.2 does not support.
            InvalidRequest: there is an image in ``inputs``, but no prompt.
        """
        parameters = self.parameters
        for name in ("negative_prompt", "scheduler"):
            if getattr(parameters, name):
                raise UnsupportedParameter(f"{name}: not supported by this model", param=name)
        is_edit = parameters.prompt is not None
        if not is_edit and ENCODED_FILE.match(self.inputs):
            raise InvalidRequest("prompt: parameters.prompt is needed to edit the image in inputs", param="prompt")
        size = parameters.target_size or parameters
        return GenerateRequest(
            **{name: getattr(parameters, name) for name in Sampling.model_fields},
            prompt=parameters.prompt if is_edit else self.inputs,
            images=[self.inputs] if is_edit else [],
            width=size.width,
            height=size.height,
        )
