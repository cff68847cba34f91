"""Loads FLUX.2's language model for benchmarks with the text encoder's ``load_encoder``.

Weights are random, generated on the device, or those of a checkpoint, loaded like in the service.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, MistralModel

from demo_model.services import WEIGHTS
from flux2_shared.model.folder import ModelFolder, PromptFormat, read_prompt_format
from text_encoder_service.app import load_encoder
from text_encoder_service.encoder import load_language_model
from text_encoder_service.fast_layers import Tokens
from text_encoder_service.settings import TextEncoderSettings, Weights

SHARE = 100 / 512
"""Share of the row that a short prompt fills."""


@dataclass(frozen=True)
class Model:
    """A language model and its prompt format."""

    name: str
    language_model: Any
    prompt_format: PromptFormat

    def tokens(self, num_prompts: int, num_tokens: int) -> Tokens:
        """Generate random prompts of ``num_tokens``, with padding."""
        length, vocabulary = self.prompt_format.max_sequence_length, self.language_model.config.vocab_size
        mask = (torch.arange(length) >= length - num_tokens).long().expand(num_prompts, -1)
        ids = torch.randint(vocabulary, mask.shape, generator=torch.Generator().manual_seed(0))
        return Tokens(torch.where(mask == 1, ids, self.language_model.config.pad_token_id), mask)

    @property
    def lengths(self) -> tuple[int, int]:
        """Number of tokens of long and of short prompts."""
        length = self.prompt_format.max_sequence_length
        return length, int(length * SHARE)


@dataclass(frozen=True)
class EncoderSource:
    """Loads new instances of a language model, like the service does."""

    path: Path
    """Folder of the model."""
    has_weights: bool = False
    """Whether the folder has weights; otherwise they are random."""
    device: str = "auto"
    """Device, as ``TEXT_ENCODER_DEVICE``."""

    @property
    def name(self) -> str:
        """Describes the source of the weights."""
        if not self.has_weights:
            return f"random weights, {self.path.name} size"
        return "the demo model" if self.path == WEIGHTS else self.path.name

    def settings(self, weights: Weights = "full") -> TextEncoderSettings:
        """Return settings for this model with the profile ``exact``."""
        return TextEncoderSettings(
            model=str(self.path), revision="local", device=self.device, weights=weights, performance="exact"
        )

    def load(self, weights: Weights) -> Model:
        """Load a new instance with the given kind of weights."""
        settings = self.settings(weights)
        random_weights = partial(random_language_model, device=settings.torch_device())
        encoder, _ = load_encoder(settings, read=load_language_model if self.has_weights else random_weights)
        return Model(self.name, encoder.language_model, encoder.prompt_format)


def random_language_model(folder: Path, num_layers: int, dtype: torch.dtype, *, device: torch.device) -> MistralModel:
    """Create the first layers of the architecture in ``folder`` on ``device``, without the final norm."""
    config = AutoConfig.from_pretrained(folder).text_config
    config.num_hidden_layers = num_layers
    made: Any = MistralModel
    with device:
        model = made._from_config(config, dtype=dtype)  # noqa: SLF001 - like from_pretrained
    model.norm = torch.nn.Identity()
    return cast("MistralModel", model)


def empty_model(path: Path) -> Model:
    """Create the architecture of a model's folder on the meta device, in bfloat16."""
    prompt_format = read_prompt_format(ModelFolder(path.name, "local", path))
    num_layers = max(prompt_format.hidden_layers)
    layers = random_language_model(path / "text_encoder", num_layers, torch.bfloat16, device=torch.device("meta"))
    return Model(f"{path.name} size", layers, prompt_format)
