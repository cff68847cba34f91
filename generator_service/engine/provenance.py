"""What is recorded in a file about how its image was generated."""

from dataclasses import asdict

from flux2_shared.model.cpu_tensors import float32_sha256
from generator_service.engine.imaging import Provenance
from generator_service.pipelines.flux2 import Flux2Model
from generator_service.pipelines.params import Params


def provenance(params: Params, model: Flux2Model) -> Provenance:
    """The record for the file of an image; includes a hash of the embedding if there is no prompt."""
    return Provenance(
        prompt=params.prompt,
        width=params.width,
        height=params.height,
        num_inference_steps=params.schedule.num_steps,
        guidance_scale=params.guidance_scale,
        seed=params.seed,
        cache=params.cache,
        schedule=str(params.schedule),
        computed_steps=list(params.schedule.computed_steps),
        model=model.info.name,
        revision=model.info.revision,
        performance=model.performance.profile,
        prompt_embeds_sha256=float32_sha256(params.embeddings) if params.prompt is None else None,
        lora=[asdict(adapter) for adapter in params.adapters],
        references_sha256=[reference.sha256 for reference in params.references],
    )
