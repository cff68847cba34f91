"""Hugging Face's inference API, for ``text_to_image`` and ``image_to_image`` of ``InferenceClient(model=url)``."""

from typing import Any

from pydantic import Field, StrictInt, StrictStr

from flux2_shared.schemas import Strict, Text
from generator_service.api.schemas import GenerateRequest, Sampling
from generator_service.errors import UnsupportedParameter


class TargetSize(Strict):
    """Size of an edited image."""

    width: StrictInt
    height: StrictInt


class Parameters(Sampling):
    """Optional parameters of a request."""

    prompt: Text | None = None
    width: StrictInt | None = None
    height: StrictInt | None = None
    target_size: TargetSize | None = None
    negative_prompt: Text | None = None
    scheduler: StrictStr | None = None


class InferenceRequest(Strict):
    """``inputs`` is the prompt, or, with ``parameters.prompt``, the image to edit as base64."""

    inputs: Text
    parameters: Parameters = Field(default_factory=Parameters)
    options: dict[str, Any] | None = None

    def native(self) -> GenerateRequest:
        """Convert to the body of ``POST /generate``.

        Raises:
            UnsupportedParameter: ``negative_prompt`` or ``scheduler`` is set, which FLUX.2 does not support.
        """
        parameters = self.parameters
        for name in ("negative_prompt", "scheduler"):
            if getattr(parameters, name):
                raise UnsupportedParameter(f"{name}: not supported by this model", param=name)
        is_edit = parameters.prompt is not None
        size = parameters.target_size or parameters
        return GenerateRequest(
            **{name: getattr(parameters, name) for name in Sampling.model_fields},
            prompt=parameters.prompt if is_edit else self.inputs,
            images=[self.inputs] if is_edit else [],
            width=size.width,
            height=size.height,
        )
