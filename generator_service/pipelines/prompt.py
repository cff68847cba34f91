"""Prompt embeddings in this process, by diffusers' own code: for the command line, where there is no second service."""

from collections.abc import Sequence

import torch
from diffusers import Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import UPSAMPLING_MAX_IMAGE_SIZE
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE_UPSAMPLING_I2I, SYSTEM_MESSAGE_UPSAMPLING_T2I

from shared.model_folder import ModelFolder, read_prompt_format

PARTS = ("text_encoder", "tokenizer")
UPSAMPLING_MESSAGE: str = SYSTEM_MESSAGE_UPSAMPLING_T2I
UPSAMPLING_MESSAGE_EDIT: str = SYSTEM_MESSAGE_UPSAMPLING_I2I
"""What FLUX.2's authors tell a chat model that rewrites prompts."""
LARGEST_UPSAMPLING_AREA: int = UPSAMPLING_MAX_IMAGE_SIZE
"""Of a picture that it sees, in pixels."""


def embed_prompts(
    folder: ModelFolder, prompts: Sequence[str], device: torch.device, dtype: torch.dtype
) -> list[torch.Tensor]:
    """An embedding ``[1, L, D]`` on the CPU for each prompt. The text encoder is loaded for them and let go again."""
    prompt_format = read_prompt_format(folder)
    pipeline = Flux2Pipeline.from_pretrained(folder.path, transformer=None, vae=None, dtype=dtype, use_safetensors=True)
    pipeline.to(device)
    pipeline.system_message = prompt_format.system_message
    embeddings: list[torch.Tensor] = []
    with torch.inference_mode():
        for prompt in prompts:
            embedding, _ = pipeline.encode_prompt(
                prompt,
                max_sequence_length=prompt_format.max_sequence_length,
                text_encoder_out_layers=prompt_format.hidden_layers,
            )
            embeddings.append(embedding.cpu())
    return embeddings
