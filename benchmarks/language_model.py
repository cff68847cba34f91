"""FLUX.2's language model for measurements: at full size with random weights, or a checkpoint's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import MistralConfig, MistralModel

from shared.model_folder import PromptFormat, find_model, read_prompt_format
from text_encoder_service.encoder import load_language_model
from text_encoder_service.fast_layers import Tokens

FLUX2_DEV = MistralConfig(
    vocab_size=131072,
    hidden_size=5120,
    intermediate_size=32768,
    num_hidden_layers=30,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 1e9},
    sliding_window=None,
    pad_token_id=11,
)
"""The language model of FLUX.2 [dev]'s text encoder, as far as it runs: 30 of its 40 layers."""
SHARE = 100 / 512
"""Of its row, that a short prompt fills."""


@dataclass(frozen=True)
class Model:
    """A language model and how prompts become its embeddings."""

    name: str
    language_model: Any
    prompt_format: PromptFormat

    def tokens(self, num_prompts: int, num_tokens: int) -> Tokens:
        """Random prompts of ``num_tokens``, padded."""
        length, vocabulary = self.prompt_format.max_sequence_length, self.language_model.config.vocab_size
        mask = (torch.arange(length) >= length - num_tokens).long().expand(num_prompts, -1)
        ids = torch.randint(vocabulary, mask.shape, generator=torch.Generator().manual_seed(0))
        return Tokens(torch.where(mask == 1, ids, self.language_model.config.pad_token_id), mask)

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of the long and of the short prompts."""
        length = self.prompt_format.max_sequence_length
        return length, int(length * SHARE)


def full_size(device: torch.device, config: MistralConfig = FLUX2_DEV) -> Model:
    """FLUX.2 [dev]'s, drawn on ``device`` itself."""
    made: Any = MistralModel
    with device:
        model = made._from_config(config, dtype=torch.bfloat16)  # noqa: SLF001 - as from_pretrained does
    model.norm = torch.nn.Identity()
    return Model("random weights, full size", model.eval(), PromptFormat())


def checkpoint(path: Path, device: torch.device) -> Model:
    """A checkpoint's, on a CPU in float32."""
    folder = find_model(str(path), "local", ("text_encoder",))
    prompt_format = read_prompt_format(folder)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model: Any = load_language_model(folder.path / "text_encoder", max(prompt_format.hidden_layers), dtype)
    return Model(folder.name, model.eval().to(device), prompt_format)
