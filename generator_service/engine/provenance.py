"""What is recorded in a file about how its image was generated."""

from dataclasses import asdict

import torch

from generator_service.imaging import Provenance
from generator_service.order import Order
from generator_service.pipelines.flux2 import Flux2Model, GenerationRequest
from shared.cpu_tensors import float32_sha256


def generation_request(order: Order, embeddings: torch.Tensor) -> GenerationRequest:
    """What the model needs to know of an order."""
    return GenerationRequest(
        prompt_embeds=embeddings,
        width=order.width,
        height=order.height,
        guidance_scale=order.guidance_scale,
        seed=order.seed,
        schedule=order.schedule,
        references=tuple(reference.image for reference in order.references),
        adapters=order.adapters,
    )


def provenance(order: Order, model: Flux2Model, embeddings: torch.Tensor) -> Provenance:
    """The record that goes into the file; hashes the embedding where no prompt stands for it."""
    return Provenance(
        prompt=order.prompt,
        width=order.width,
        height=order.height,
        num_inference_steps=order.schedule.num_steps,
        guidance_scale=order.guidance_scale,
        seed=order.seed,
        cache=order.cache,
        schedule=str(order.schedule),
        computed_steps=list(order.schedule.computed_steps),
        model=model.card.name,
        revision=model.card.revision,
        performance=model.performance.profile,
        prompt_embeds_sha256=float32_sha256(embeddings) if order.prompt is None else None,
        lora=[asdict(adapter) for adapter in order.adapters],
        references_sha256=[reference.sha256 for reference in order.references],
    )
