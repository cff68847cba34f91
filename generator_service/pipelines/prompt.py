"""Embeds prompts in this process with diffusers, for the command line without services."""

import gc
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers import Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import UPSAMPLING_MAX_IMAGE_SIZE
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE_UPSAMPLING_I2I, SYSTEM_MESSAGE_UPSAMPLING_T2I
from transformers import Mistral3ForConditionalGeneration
from transformers.utils import logging as transformers_logging

from flux2_shared.device.resolve import use_device
from flux2_shared.embedding import Embedding
from flux2_shared.errors import ModelRefused
from flux2_shared.model.attention import check_finite, run_finite
from flux2_shared.model.folder import ModelFolder, PromptFormat, read_prompt_format
from flux2_shared.model.loading import loading_errors
from flux2_shared.model.tokenizer import is_longer, load_tokenizer

UPSAMPLING_MESSAGE: str = SYSTEM_MESSAGE_UPSAMPLING_T2I
UPSAMPLING_MESSAGE_EDIT: str = SYSTEM_MESSAGE_UPSAMPLING_I2I
"""System messages of FLUX.2's authors for a chat model that rewrites prompts."""
LARGEST_UPSAMPLING_AREA: int = UPSAMPLING_MAX_IMAGE_SIZE
"""Largest reference image for the chat model, in pixels."""


def embed_prompts(
    folder: ModelFolder, prompts: Sequence[str], device: torch.device, dtype: torch.dtype
) -> list[Embedding]:
    """Load the text encoder, embed all prompts, and free it. Return embeddings of shape ``[1, L, D]`` on the CPU.

    Raises:
        ModelRefused: the text encoder or its tokenizer is not usable.
    """
    use_device(device)
    prompt_format = read_prompt_format(folder)
    embeddings, _ = run_finite(partial(_embed, load_pipeline(folder, device, dtype), prompts, prompt_format))
    gc.collect()  # frees modules with reference cycles, because the transformer needs the memory
    torch.cuda.empty_cache()
    return embeddings


def load_pipeline(folder: ModelFolder, device: torch.device, dtype: torch.dtype) -> Flux2Pipeline:
    """Load a pipeline that only embeds prompts, shard by shard to ``device``.

    ``Flux2Pipeline.from_pretrained`` is not used, because it loads the tokenizer with the class in
    ``model_index.json``: for FLUX.2 [dev] an image processor, which needs torchvision.

    Raises:
        ModelRefused: the text encoder or its tokenizer is not usable.
        OutOfMemory: the text encoder does not fit into the memory of ``device``.
    """
    transformers_logging.disable_progress_bar()
    tokenizer = load_tokenizer(folder)
    with loading_errors(f"the text encoder of {folder.name}", device):
        loaded: Any = Mistral3ForConditionalGeneration.from_pretrained(
            folder.path / "text_encoder",
            dtype=dtype,
            use_safetensors=True,
            device_map={"": device},
            output_loading_info=True,
        )
    text_encoder, report = loaded
    if report["missing_keys"]:  # transformers would initialize them randomly
        raise ModelRefused(f"the text encoder's checkpoint lacks {len(report['missing_keys'])} tensors")
    return Flux2Pipeline(scheduler=None, vae=None, text_encoder=text_encoder, tokenizer=tokenizer, transformer=None)


@torch.inference_mode()
def _embed(pipeline: Flux2Pipeline, prompts: Sequence[str], prompt_format: PromptFormat) -> list[Embedding]:
    pipeline.system_message = prompt_format.system_message
    embeddings: list[Embedding] = []
    for prompt in prompts:
        embedding, _ = pipeline.encode_prompt(
            prompt,
            max_sequence_length=prompt_format.max_sequence_length,
            text_encoder_out_layers=prompt_format.hidden_layers,
        )
        is_truncated = is_longer(pipeline.tokenizer, prompt, prompt_format)
        embeddings.append(Embedding(check_finite(embedding.cpu()), is_truncated))
    return embeddings
