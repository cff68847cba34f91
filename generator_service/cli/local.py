"""Generation without services: loads the text encoder, then the transformer and VAE, into this process."""

from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from flux2_shared.errors import InvalidRequest
from flux2_shared.model.folder import find_model
from flux2_shared.model.subfolders import ALL_SUBFOLDERS
from generator_service.api.resolve import Resolver, open_registry
from generator_service.api.schemas import GenerateRequest
from generator_service.engine.imaging import Provenance, encode_image
from generator_service.engine.latency import LatencyModel
from generator_service.pipelines import flux2, prompt
from generator_service.pipelines.params import Params
from generator_service.settings import GeneratorSettings


@dataclass(frozen=True)
class LocalResult:
    """An encoded image and the parameters it was generated with."""

    data: bytes
    params: Params
    denoise_s: float


def generate(body: dict[str, Any], settings: GeneratorSettings, on_step: flux2.StepCallback) -> LocalResult:
    """Generate the image of a ``POST /generate`` body.

    Raises:
        InvalidRequest: a field of ``body`` is invalid.
        ModelRefused: the model of ``settings`` cannot be loaded.
    """
    try:
        valid = GenerateRequest(**body)
    except ValidationError as error:
        raise InvalidRequest("; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())) from None
    device, dtype = settings.torch_device(), settings.torch_dtype()
    folder = find_model(settings.model, settings.revision, ALL_SUBFOLDERS)
    assert valid.prompt is not None  # the command line does not accept embeddings
    (embedding,) = prompt.embed_prompts(folder, [valid.prompt], device, dtype)
    model = flux2.Flux2Model.load(folder, device, dtype, settings.lora_dir, settings.max_loras)
    shape = (embedding.tensor.shape[1], embedding.tensor.shape[2])
    resolver = Resolver(settings, model.info, open_registry(settings, model.info), shape, LatencyModel())
    request = resolver.resolve(valid, is_followed=False)
    params = replace(request.params, prompt_embeds=embedding.tensor, is_truncated=embedding.is_truncated)
    image = model.generate(params, on_step)
    data = encode_image(image.image, request.output_format, Provenance.of(params, model))
    return LocalResult(data, params, image.denoise_s)
