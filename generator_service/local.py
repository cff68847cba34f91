"""Pictures without services: the model is loaded into this process, text encoder first, then the rest."""

from typing import Any

from pydantic import ValidationError

from generator_service.api.schemas import GenerateRequest
from generator_service.engine.provenance import generation_request, provenance
from generator_service.imaging import encode_image
from generator_service.order import Order, make_order, open_registry
from generator_service.pipelines import flux2, parts, prompt
from generator_service.settings import GeneratorSettings
from shared.errors import InvalidRequest
from shared.model_folder import find_model


def draw(body: dict[str, Any], settings: GeneratorSettings, on_step: flux2.StepListener) -> tuple[bytes, Order, float]:
    """Do what ``POST /generate`` does with ``body``.

    Returns:
        The picture file, the completed order, and the seconds that denoising took.

    Raises:
        InvalidRequest: a field of ``body`` cannot be used.
        ModelRefused: the model of ``settings`` cannot be loaded.
    """
    try:
        request = GenerateRequest(**body)
    except ValidationError as error:
        raise InvalidRequest("; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())) from None
    device, dtype = settings.torch_device(), settings.torch_dtype()
    folder = find_model(settings.model, settings.revision, (*parts.PARTS, *prompt.PARTS))
    assert request.prompt is not None  # the command line gives no embeddings
    (embeddings,) = prompt.embed_prompts(folder, [request.prompt], device, dtype)
    model = flux2.Flux2Model.load(folder, device, dtype, settings.lora_dir, settings.max_loras)
    shape = (embeddings.shape[1], embeddings.shape[2])
    order = make_order(request, settings, model.card, open_registry(settings, model.card), shape)
    picture = model.generate(generation_request(order, embeddings), on_step)
    record = provenance(order, model, embeddings)
    return encode_image(picture.image, order.output_format, record), order, picture.denoise_s
