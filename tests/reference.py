"""A plain implementation of LeMiCa's loop, which the product must equal bit for bit."""

from typing import Any

import numpy as np
import torch
from diffusers import Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu


def blocks(model: Any, hidden: torch.Tensor, text: torch.Tensor, temb: torch.Tensor, rope: Any) -> torch.Tensor:
    """The transformer's blocks, from embedded tokens to the input of ``norm_out``, without text tokens."""
    modulation_image = model.double_stream_modulation_img(temb)
    modulation_text = model.double_stream_modulation_txt(temb)
    for block in model.transformer_blocks:
        text, hidden = block(
            hidden_states=hidden,
            encoder_hidden_states=text,
            temb_mod_img=modulation_image,
            temb_mod_txt=modulation_text,
            image_rotary_emb=rope,
        )
    joined = torch.cat([text, hidden], dim=1)
    modulation = model.single_stream_modulation(temb)
    for block in model.single_transformer_blocks:
        joined = block(hidden_states=joined, encoder_hidden_states=None, temb_mod=modulation, image_rotary_emb=rope)
    return joined[:, text.shape[1] :]


@torch.no_grad()
def denoise(
    pipeline: Flux2Pipeline,
    embeddings: torch.Tensor,
    *,
    width: int,
    height: int,
    num_steps: int,
    computed: set[int],
    seed: int,
    guidance_scale: float = 4.0,
    references: list[Any] | None = None,
) -> torch.Tensor:
    """Final latents ``[1, tokens, C]`` of a run whose steps outside ``computed`` reuse the last residual."""
    model, generator = pipeline.transformer, torch.Generator().manual_seed(seed)
    latents: torch.Tensor
    latents, image_ids = pipeline.prepare_latents(
        1, model.config.in_channels // 4, height, width, embeddings.dtype, "cpu", generator
    )
    count = latents.shape[1]
    reference_latents = latents[:, :0]
    if references:
        tensors = [
            pipeline.image_processor.preprocess(image, height=image.height, width=image.width, resize_mode="crop")
            for image in references
        ]
        reference_latents, ids = pipeline.prepare_image_latents(tensors, 1, generator, "cpu", pipeline.vae.dtype)
        image_ids = torch.cat([image_ids, ids], dim=1)
    text_ids = pipeline._prepare_text_ids(embeddings)
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(
        sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=compute_empirical_mu(count, num_steps)
    )
    rope_tables = [model.pos_embed(ids[0]) for ids in (text_ids, image_ids)]
    rope = tuple(torch.cat(tables, dim=0) for tables in zip(*rope_tables, strict=True))
    text = model.context_embedder(embeddings)
    guidance = torch.full([1], guidance_scale) * 1000
    residual = torch.empty(0)
    for step, time in enumerate(scheduler.timesteps):
        temb = model.time_guidance_embed(time.expand(1) / 1000 * 1000, guidance)
        if step in computed:
            h_in = model.x_embedder(torch.cat([latents, reference_latents], dim=1))
            h_out = blocks(model, h_in, text, temb, rope)
            residual = h_out[:, :count] - h_in[:, :count]
            velocity = model.proj_out(model.norm_out(h_out, temb))[:, :count]
        else:
            velocity = model.proj_out(model.norm_out(model.x_embedder(latents) + residual, temb))
        latents = scheduler.step(velocity, time, latents, return_dict=False)[0]
    return latents
