"""FLUX.2's language model for measurements, loaded by the text encoder's own ``load_encoder``.

At full size its weights are random, made on the device itself; a checkpoint's are read as the service reads them.
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


@dataclass(frozen=True)
class EncoderSource:
    """Loads the same language model again and again, as the service does."""

    path: Path
    """A model's folder."""
    has_weights: bool = False
    """Whether the folder has weights; else they are random."""
    device: str = "auto"
    """As ``TEXT_ENCODER_DEVICE``."""

    @property
    def name(self) -> str:
        """Where the weights come from."""
        if not self.has_weights:
            return f"random weights, {self.path.name} size"
        return "the demo model" if self.path == WEIGHTS else self.path.name

    def settings(self, weights: Weights = "full") -> TextEncoderSettings:
        """Those of a service with this model, which is left as it is loaded."""
        return TextEncoderSettings(
            model=str(self.path), revision="local", device=self.device, weights=weights, performance="exact"
        )

    def load(self, weights: Weights) -> Model:
        """A fresh one, whose layers' weights are stored in ``weights``."""
        settings = self.settings(weights)
        made_up = partial(random_language_model, device=settings.torch_device())
        encoder, _ = load_encoder(settings, read=load_language_model if self.has_weights else made_up)
        return Model(self.name, encoder.language_model, encoder.prompt_format)


def random_language_model(folder: Path, num_layers: int, dtype: torch.dtype, *, device: torch.device) -> MistralModel:
    """The first layers of the architecture in ``folder``, without its final norm, made on ``device`` itself."""
    config = AutoConfig.from_pretrained(folder).text_config
    config.num_hidden_layers = num_layers
    made: Any = MistralModel
    with device:
        model = made._from_config(config, dtype=dtype)  # noqa: SLF001 - as from_pretrained does
    model.norm = torch.nn.Identity()
    return cast("MistralModel", model)


def empty_model(path: Path) -> Model:
    """The architecture in a model's folder on the meta device, in bfloat16."""
    prompt_format = read_prompt_format(ModelFolder(path.name, "local", path))
    num_layers = max(prompt_format.hidden_layers)
    layers = random_language_model(path / "text_encoder", num_layers, torch.bfloat16, device=torch.device("meta"))
    return Model(f"{path.name} size", layers, prompt_format)
