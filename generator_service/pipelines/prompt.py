"""Prompt embeddings in this process, by diffusers' own code: for ``--local``, where there is no second service."""

import torch
from diffusers import Flux2Pipeline

from shared.model_folder import ModelFolder, read_prompt_format

PARTS = ("text_encoder", "tokenizer")


def embed_prompt(folder: ModelFolder, prompt: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The embedding ``[1, L, D]`` on the CPU. The text encoder is loaded for this one prompt and let go again."""
    prompt_format = read_prompt_format(folder)
    pipeline = Flux2Pipeline.from_pretrained(folder.path, transformer=None, vae=None, dtype=dtype, use_safetensors=True)
    pipeline.to(device)
    pipeline.system_message = prompt_format.system_message
    with torch.inference_mode():
        embeddings, _ = pipeline.encode_prompt(
            prompt,
            max_sequence_length=prompt_format.max_sequence_length,
            text_encoder_out_layers=prompt_format.hidden_layers,
        )
    tensor: torch.Tensor = embeddings.cpu()
    return tensor
