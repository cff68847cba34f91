"""Prompt embeddings in this process, by diffusers' own code: for the command line, where there is no second service."""

from collections.abc import Sequence

import torch
from diffusers import Flux2Pipeline

from shared.model_folder import ModelFolder, read_prompt_format

PARTS = ("text_encoder", "tokenizer")


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
