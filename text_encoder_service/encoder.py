"""FLUX.2's prompt encoder: a Mistral 3 language model, truncated after the last layer whose output is used.

FLUX.2 concatenates the hidden states of some layers (10, 20 and 30 of 40 for [dev]), taken before the final norm. Later
layers, the norm, the head and the vision tower are never loaded. Independent of HTTP and caching.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, MistralModel
from transformers.utils import logging as transformers_logging

from flux2_shared.device.memory import run_within_memory
from flux2_shared.device.resolve import use_device
from flux2_shared.embedding import Embedding
from flux2_shared.errors import ModelRefused, OutOfMemory
from flux2_shared.model.attention import Attention, NonFiniteStates, check_finite, run_finite
from flux2_shared.model.compilation import CompilerBackend
from flux2_shared.model.folder import ModelFolder, PromptFormat
from flux2_shared.model.loading import loading_errors
from flux2_shared.model.tokenizer import conversation, is_longer, load_tokenizer
from flux2_shared.report import Report, ignore
from text_encoder_service.fast_layers import Forward, Tokens, fast_forward
from text_encoder_service.quantization import quantize
from text_encoder_service.settings import Weights
from text_encoder_service.shapes import ShapeBuckets

LANGUAGE_MODEL_KEYS = {r"^(model\.)?language_model\.(model\.)?": ""}
"""Maps the old and the new prefix of the language model in Mistral 3 checkpoints to its own parameter names."""
SHORT_PROMPT = "a red circle"
"""A prompt whose row is mostly padding."""
logger = logging.getLogger("flux2")


LanguageModelReader = Callable[[Path, int, torch.dtype], MistralModel]
"""Loads the first layers of a text encoder, given its folder, the number of layers and the dtype."""


class _FirstLayers(MistralModel):
    """A language model that silently ignores the checkpoint's other weights."""

    _keys_to_ignore_on_load_unexpected = [r"^layers\.", r"lm_head", r"vision_tower", r"multi_modal_projector"]  # noqa: RUF012


class MistralEncoder:
    """Encodes batches of prompts like ``Flux2Pipeline.encode_prompt`` with the full text encoder.

    Embeddings are bit-exact; after ``compile`` they are equal up to rounding, with quantized weights approximately.

    Args:
        folder: a checked model.
        prompt_format: the model's prompt format.
        device: the device that the model runs on.
        dtype: the dtype of weights and embeddings.
        weights: how the weights of the decoder layers are stored.
        read: loads the weights; by default from the files of ``folder``.

    Raises:
        ModelRefused: the text encoder or its tokenizer cannot be used.
        OutOfMemory: its weights do not fit into the device's memory.
    """

    def __init__(
        self,
        folder: ModelFolder,
        prompt_format: PromptFormat,
        device: torch.device,
        dtype: torch.dtype,
        weights: Weights = "full",
        read: LanguageModelReader | None = None,
    ) -> None:
        self.prompt_format = prompt_format
        self._device = device
        use_device(device)
        self._tokenizer = load_tokenizer(folder)
        num_layers = max(prompt_format.hidden_layers)
        with loading_errors("the text encoder", device):
            self._model: Any = (read or load_language_model)(folder.path / "text_encoder", num_layers, dtype).eval()
            if weights != "full":
                quantize(self._model.layers, weights, device)
            self._model.to(device)
        self.hidden_size = int(self._model.config.hidden_size)
        self.dtype = dtype
        self._exact: Forward = partial(run_library, self._model, prompt_format.hidden_layers)
        self._forward: Forward = self._exact
        self.attention: Attention = "any"
        """The attention kernels that PyTorch may choose from."""
        self._check_attention()

    @torch.inference_mode()
    def _check_attention(self) -> None:
        """Disable attention kernels that give NaN for padding; raise ``NonFiniteStates`` if all do."""
        tokens = self._tokenize([SHORT_PROMPT])
        _, self.attention = run_finite(lambda: check_finite(self._exact(tokens)), self.attention)

    @property
    def language_model(self) -> MistralModel:
        """The truncated language model, without the final norm."""
        return cast("MistralModel", self._model)

    @torch.inference_mode()
    def compile(self, max_batch: int, backend: CompilerBackend = "inductor", report: Report = ignore) -> None:
        """Trim prompts, and compile for batches of up to ``max_batch``. Takes minutes; see ``fast_forward``.

        Attention kernels that give NaN in the compiled model only are disabled as well.

        Args:
            max_batch: the most prompts in one forward pass.
            backend: as for ``torch.compile``.
            report: called with the progress.

        Raises:
            OutOfMemory: the device has too little memory for such batches.
        """
        hidden_layers, length = self.prompt_format.hidden_layers, self.prompt_format.max_sequence_length
        prompts = ["circle " * (length * share // 8) for share in (0, 1, 3, 5, 8)]
        check_inputs = [self._tokenize(batch) for batch in (*([prompt] for prompt in prompts), prompts[:max_batch])]
        shapes = ShapeBuckets.up_to(max_batch, length)
        use_device(self._device)

        def build() -> Forward:
            return run_within_memory(
                lambda: fast_forward(self._model, hidden_layers, shapes, self._exact, check_inputs, backend, report),
                f"batches of {max_batch} prompts do not fit into the device's memory: lower TEXT_ENCODER_MAX_BATCH",
            )

        try:
            self._forward, self.attention = run_finite(build, self.attention)
        except NonFiniteStates:
            logger.warning("the trimmed or compiled text encoder gives NaN; falling back to performance=exact")
            self.attention = "math"
            self._check_attention()

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> list[Embedding]:
        """Encode prompts. The rows of a batch do not depend on each other.

        A batch that does not fit into memory is split; a single prompt is retried once.

        Returns:
            One embedding for each prompt, in order.

        Raises:
            OutOfMemory: the device has too little memory for one of the prompts.
        """
        use_device(self._device)
        tokens = self._tokenize(prompts)
        return [
            Embedding(row, self._is_truncated(prompt, mask))
            for row, prompt, mask in zip(self._rows(tokens), prompts, tokens.mask, strict=True)
        ]

    def _rows(self, tokens: Tokens) -> list[torch.Tensor]:
        """Run the model: ``[1, L, layers * H]`` for each prompt, on the CPU."""
        num_prompts = len(tokens.ids)
        what = "a prompt" if num_prompts == 1 else f"a batch of {num_prompts} prompts"
        refusal = f"{what} does not fit into the device's memory now"
        try:
            return run_within_memory(
                lambda: to_pinned(self._forward(tokens).flatten(2)), refusal, num_attempts=1 if num_prompts > 1 else 2
            )
        except OutOfMemory:
            if num_prompts == 1:
                raise
        return [row for half in tokens.halves() for row in self._rows(half)]

    def _tokenize(self, prompts: Sequence[str]) -> Tokens:
        """Apply the chat template and tokenize, truncated or padded to the maximum length."""
        batch: Any = self._tokenizer.apply_chat_template(
            [conversation(prompt, self.prompt_format.system_message) for prompt in prompts],
            add_generation_prompt=False,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding="max_length",
            truncation=True,
            max_length=self.prompt_format.max_sequence_length,
        )
        return Tokens(batch["input_ids"], batch["attention_mask"])

    def _is_truncated(self, prompt: str, attention_mask: torch.Tensor) -> bool:
        """Return whether a prompt was truncated. Only prompts that fill their row are tokenized again to find out."""
        return bool(attention_mask.all()) and is_longer(self._tokenizer, prompt, self.prompt_format)


def run_library(model: Any, hidden_layers: Sequence[int], tokens: Tokens) -> torch.Tensor:
    """Run the library's forward pass and stack the wanted hidden states; a ``Forward``."""
    # output_hidden_states is not used, because it leaves hooks on the layers that cannot be compiled later.
    with recorded([model.embed_tokens, *model.layers]) as states:
        model(input_ids=tokens.ids.to(model.device), attention_mask=tokens.mask.to(model.device), use_cache=False)
    return torch.stack([states[number] for number in hidden_layers], dim=2)


def to_pinned(batch: torch.Tensor) -> list[torch.Tensor]:
    """Copy each row of ``batch`` ``[B, L, D]`` to the CPU as a separate tensor ``[1, L, D]``.

    Rows on a GPU are copied to pinned memory, at full bus speed, with one synchronization for all of them. Overlapping
    the copies with the next batch would save less than a millisecond of the tens that a forward pass takes.
    """
    if batch.device.type != "cuda":
        return [row.clone() for row in batch.cpu().split(1)]
    rows = [
        torch.empty_like(row, device="cpu", pin_memory=True).copy_(row, non_blocking=True) for row in batch.split(1)
    ]
    torch.cuda.current_stream(batch.device).synchronize()
    return rows


@contextmanager
def recorded(modules: Sequence[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """Record the outputs of ``modules`` within the block, in the order in which they run."""
    outputs: list[torch.Tensor] = []

    def record(_module: nn.Module, _args: object, output: torch.Tensor) -> None:
        outputs.append(output)

    handles = [module.register_forward_hook(record) for module in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def load_language_model(folder: Path, num_layers: int, dtype: torch.dtype) -> MistralModel:
    """Load the first ``num_layers`` layers of the Mistral 3 checkpoint in ``folder``, without the final norm.

    Raises:
        ModelRefused: it is not one, or tensors are missing.
    """
    transformers_logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != "mistral3" or config.text_config.num_hidden_layers < num_layers:
        raise ModelRefused(f"the text encoder is not a Mistral 3 of at least {num_layers} layers")
    text_config = config.text_config
    text_config.num_hidden_layers = num_layers
    loaded: Any = _FirstLayers.from_pretrained(
        folder,
        config=text_config,
        dtype=dtype,
        use_safetensors=True,
        key_mapping=LANGUAGE_MODEL_KEYS,
        output_loading_info=True,
    )
    model, report = loaded
    if report["missing_keys"]:
        raise ModelRefused(f"the text encoder's checkpoint lacks {len(report['missing_keys'])} tensors")
    model.norm = torch.nn.Identity()
    return cast("MistralModel", model)
