"""The bodies of Hugging Face's inference API: ``InferenceClient(model="http://...")`` draws and edits unchanged."""

from typing import Any

from pydantic import Field, StrictInt, StrictStr

from flux2_shared.schemas import Strict, Text
from generator_service.api.schemas import GenerateRequest, Sampling
from generator_service.errors import UnsupportedParameter


class TargetSize(Strict):
    """Of an edited picture."""

    width: StrictInt
    height: StrictInt


class Parameters(Sampling):
    """What the client's methods send beside their input."""

    prompt: Text | None = None
    width: StrictInt | None = None
    height: StrictInt | None = None
    target_size: TargetSize | None = None
    negative_prompt: Text | None = None
    scheduler: StrictStr | None = None


class InferenceRequest(Strict):
    """``inputs`` is a prompt; with ``parameters.prompt`` it is the picture to edit, as base64."""

    inputs: Text
    parameters: Parameters = Field(default_factory=Parameters)
    options: dict[str, Any] | None = None

    def native(self) -> GenerateRequest:
        """The same request in this service's own words.

        Raises:
            UnsupportedParameter: it asks for what FLUX.2 does not have.
        """
        given = self.parameters
        for name in ("negative_prompt", "scheduler"):
            if getattr(given, name):
                raise UnsupportedParameter(f"{name}: this model has none", param=name)
        is_edit = given.prompt is not None
        size = given.target_size or given
        return GenerateRequest(
            **{name: getattr(given, name) for name in Sampling.model_fields},
            prompt=given.prompt if is_edit else self.inputs,
            images=[self.inputs] if is_edit else [],
            width=size.width,
            height=size.height,
        )
