"""FLUX.2's prompt encoder: a Mistral 3 language model, cut off after the last layer whose output is wanted.

FLUX.2 joins the hidden states of some layers (10, 20 and 30 of 40 for [dev]), taken before the final norm. What comes
after the last of them, the norm, the head and the vision tower are never loaded. Knows nothing of HTTP or caches.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, MistralModel
from transformers.utils import logging as transformers_logging

from shared.attention import Attention, NonFiniteStates, check_finite, run_finite
from shared.compilation import CompilerBackend
from shared.device import use_device
from shared.device_memory import run_within_memory
from shared.errors import ModelRefused, OutOfMemory
from shared.loading import loading_errors
from shared.model_folder import ModelFolder, PromptFormat
from shared.report import Report, ignore
from shared.tokenizer import load_tokenizer
from text_encoder_service.fast_layers import Forward, Tokens, fast_forward
from text_encoder_service.quantization import quantize
from text_encoder_service.settings import Weights
from text_encoder_service.shapes import ShapeBuckets

LANGUAGE_MODEL_KEYS = {r"^(model\.)?language_model\.(model\.)?": ""}
"""A Mistral 3 checkpoint's names for its language model, old and new, to that model's own names."""
SHORT_PROMPT = "a red circle"
"""Nearly all of its row is padding."""
logger = logging.getLogger("flux2")


@dataclass(frozen=True)
class Embedding:
    """One prompt's embedding, ``[1, L, layers * hidden]`` on the CPU, and whether the prompt had to be cut."""

    tensor: torch.Tensor
    is_truncated: bool

    @property
    def nbytes(self) -> int:
        """The tensor's size in bytes."""
        return self.tensor.nbytes


LanguageModelReader = Callable[[Path, int, torch.dtype], MistralModel]
"""The first layers of a text encoder: its folder, how many, their dtype. ``load_language_model`` reads their files."""


class _FirstLayers(MistralModel):
    """A language model that finds more in its checkpoint than it wants, and says nothing of it."""

    _keys_to_ignore_on_load_unexpected = [r"^layers\.", r"lm_head", r"vision_tower", r"multi_modal_projector"]  # noqa: RUF012


class MistralEncoder:
    """Encodes batches of prompts as ``Flux2Pipeline.encode_prompt`` does with the whole text encoder.

    Bit for bit; after ``compile`` up to rounding, with quantised ``weights`` nearly.

    Args:
        folder: a checked model.
        prompt_format: the model's.
        device: where it computes.
        dtype: of the weights, and of embeddings.
        weights: how the layers' weights are stored.
        read: where the weights come from, if not from the files of ``folder``; benchmarks make some up.

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
        """The kernels that PyTorch may choose from."""
        self._check_attention()

    @torch.inference_mode()
    def _check_attention(self) -> None:
        """Rule out attention kernels that give NaN for padding; ``NonFiniteStates`` if all do."""
        tokens = self._tokenize([SHORT_PROMPT])
        _, self.attention = run_finite(lambda: check_finite(self._exact(tokens)), self.attention)

    @property
    def language_model(self) -> MistralModel:
        """The layers that run, without the final norm."""
        return cast("MistralModel", self._model)

    @torch.inference_mode()
    def compile(self, max_batch: int, backend: CompilerBackend = "inductor", report: Report = ignore) -> None:
        """Trim prompts, and compile for batches of up to ``max_batch``. Takes minutes; see ``fast_forward``.

        Attention kernels that give NaN for padding here, but did not before, are ruled out.

        Args:
            max_batch: the most prompts that share a forward pass.
            backend: as ``torch.compile``'s.
            report: gets the progress.

        Raises:
            OutOfMemory: the device has too little memory for such batches.
        """
        wanted, length = self.prompt_format.hidden_layers, self.prompt_format.max_sequence_length
        prompts = ["circle " * (length * share // 8) for share in (0, 1, 3, 5, 8)]
        check_inputs = [self._tokenize(batch) for batch in (*([prompt] for prompt in prompts), prompts[:max_batch])]
        shapes = ShapeBuckets.up_to(max_batch, length)
        use_device(self._device)

        def fast() -> Forward:
            return run_within_memory(
                lambda: fast_forward(self._model, wanted, shapes, self._exact, check_inputs, backend, report),
                f"batches of {max_batch} prompts do not fit into the device's memory: lower TEXT_ENCODER_MAX_BATCH",
            )

        try:
            self._forward, self.attention = run_finite(fast, self.attention)
        except NonFiniteStates:
            logger.warning("the text encoder gives NaN where it is trimmed or compiled: performance is exact")
            self.attention = "math"
            self._check_attention()

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> list[Embedding]:
        """One embedding for each prompt, in order. Rows of a batch do not depend on each other.

        A batch that does not fit into memory is divided; a single prompt is tried once more.

        Raises:
            OutOfMemory: the device has too little memory for one of them.
        """
        use_device(self._device)
        tokens = self._tokenize(prompts)
        return [
            Embedding(row, self._is_truncated(prompt, mask))
            for row, prompt, mask in zip(self._rows(tokens), prompts, tokens.mask, strict=True)
        ]

    def _rows(self, tokens: Tokens) -> list[torch.Tensor]:
        """``[1, L, layers * H]`` of each prompt, on the CPU."""
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
        """The prompts in their template, cut or padded to the model's length."""
        batch: Any = self._tokenizer.apply_chat_template(
            [self._conversation(prompt) for prompt in prompts],
            add_generation_prompt=False,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding="max_length",
            truncation=True,
            max_length=self.prompt_format.max_sequence_length,
        )
        return Tokens(batch["input_ids"], batch["attention_mask"])

    def _conversation(self, prompt: str) -> list[dict[str, object]]:
        """The chat that FLUX.2 makes of a prompt."""
        content = prompt.replace("[IMG]", "")  # the mark of an image, of which there is none
        return [
            {"role": "system", "content": [{"type": "text", "text": self.prompt_format.system_message}]},
            {"role": "user", "content": [{"type": "text", "text": content}]},
        ]

    def _is_truncated(self, prompt: str, attention_mask: torch.Tensor) -> bool:
        """A prompt that fills its row may have been cut; only then is it tokenised again to find out."""
        if not bool(attention_mask.all()):
            return False
        whole: Any = self._tokenizer.apply_chat_template(self._conversation(prompt), tokenize=True, return_dict=True)
        return len(whole["input_ids"]) > self.prompt_format.max_sequence_length


def run_library(model: Any, hidden_layers: Sequence[int], tokens: Tokens) -> torch.Tensor:
    """The library's forward pass, whose hidden states are taken before its final norm; a ``Forward``."""
    # Not by output_hidden_states: the hooks that it leaves on the layers could not be compiled later.
    with recorded([model.embed_tokens, *model.layers]) as states:
        model(input_ids=tokens.ids.to(model.device), attention_mask=tokens.mask.to(model.device), use_cache=False)
    return torch.stack([states[number] for number in hidden_layers], dim=2)


def to_pinned(batch: torch.Tensor) -> list[torch.Tensor]:
    """Each row of ``batch`` ``[B, L, D]`` as ``[1, L, D]`` in memory of its own.

    Pinned memory lets a GPU copy at the speed of its bus. All rows are under way before the one wait; making the next
    batch start meanwhile would gain less than a millisecond of the tens that a forward pass takes.
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
    """What ``modules`` put out within the block, in the order in which they ran."""
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
    """The first ``num_layers`` layers of the Mistral 3 checkpoint in ``folder``, without its final norm.

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
