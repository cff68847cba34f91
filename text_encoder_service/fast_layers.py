"""The decoder layers of the ``fast`` profile: compiled, and without most of the padding.

FLUX.2 pads prompts on the left to 512 tokens. No token attends to padding, and padding attends to no token: PyTorch's
SDPA (unlike transformers' eager attention) gives 0 for it. Its hidden states therefore depend on its own embedding
only, and are the same at every position of every prompt. It is equivalent to compute only the prompt's tokens, at their
positions in the padded prompt, and to fill the rest with the hidden states of one padding token.

The result equals the library's forward pass up to rounding, which ``fast_forward`` verifies on the served checkpoint at
startup.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flux2_shared.model.attention import NonFiniteStates, check_finite
from flux2_shared.model.compilation import (
    CompilationFailed,
    CompilerBackend,
    compile_parts,
    compiling,
    describe_failure,
    eager_on_recompile,
    restore_parts,
)
from flux2_shared.model.compile_cache import warn_if_caches_unwritable
from flux2_shared.report import Report, ignore
from text_encoder_service.shapes import ShapeBuckets

logger = logging.getLogger("flux2")

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.15}
"""The largest ``difference`` from the library's hidden states that counts as rounding.

With 30 layers of random weights, compiled and eager results differed by 6e-6 in float32 and 0.08 in bfloat16. Replacing
one token, comparable to a mistake in the mask or the positions, gave at least 0.24.
"""


@dataclass(frozen=True)
class Tokens:
    """Tokenized prompts, padded on the left to the full length."""

    ids: torch.Tensor
    """``[B, L]``, on the CPU."""
    mask: torch.Tensor
    """``[B, L]``, on the CPU: 1 for tokens of the prompt, 0 for padding."""

    @property
    def longest(self) -> int:
        """The number of tokens of the longest prompt, without padding."""
        return int(self.mask.sum(dim=1).max())

    def halves(self) -> tuple["Tokens", "Tokens"]:
        """Split the batch in two; the second half gets the odd prompt."""
        middle = len(self.ids) // 2
        return Tokens(self.ids[:middle], self.mask[:middle]), Tokens(self.ids[middle:], self.mask[middle:])


Forward = Callable[[Tokens], torch.Tensor]
"""Maps tokens to the wanted hidden states, ``[B, L, layers, H]`` on the model's device."""


class FastLayers:
    """A ``Forward`` that pads batches to shape buckets instead of the full length.

    Args:
        model: the language model.
        hidden_layers: the wanted hidden states; 0 is the token embeddings.
        shapes: the shape buckets; the longest length is L.
        padding: the hidden states of a padding token ``[1, 1, layers, H]``, which replace those of all padding. None:
            prompts are not trimmed.
    """

    def __init__(
        self, model: Any, hidden_layers: Sequence[int], shapes: ShapeBuckets, padding: torch.Tensor | None = None
    ) -> None:
        self._model = model
        self._hidden_layers = hidden_layers
        self.shapes = shapes if padding is not None else shapes.untrimmed()
        self._padding = padding

    def __call__(self, tokens: Tokens) -> torch.Tensor:
        """Run one batch; shapes that were not compiled run eagerly."""
        num_prompts = len(tokens.ids)
        batch, length = self.shapes.bucket_for(num_prompts, tokens.longest)
        ids, mask = (_grown(rows[:, -length:], batch) for rows in (tokens.ids, tokens.mask))
        with eager_on_recompile():
            states = self._run(ids, mask)[:num_prompts]
        return states if self._padding is None else self._padded(states, tokens.mask[:, -length:])

    def compile(self, backend: CompilerBackend, report: Report = ignore) -> None:
        """Compile the layers, in place, for all shapes; ``report`` gets the progress.

        Raises:
            CompilationFailed: compilation failed; the layers are restored.
        """
        try:
            with compiling():
                compile_parts(list(self._model.layers), backend)
                for number, (batch, length) in enumerate(self.shapes, 1):
                    report(f"warming up: {number} of {len(self.shapes)}, {batch} x {length} tokens")
                    ones = torch.ones(batch, length, dtype=torch.long)
                    self._run(ones, ones)
        except CompilationFailed:
            self.restore()
            raise

    def restore(self) -> None:
        """Undo ``compile``."""
        restore_parts(list(self._model.layers))

    def _run(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Run the layers, ``[B, T]`` to ``[B, T, layers, H]``, without the hooks that the library would need."""
        device = self._model.device
        hidden = self._model.embed_tokens(ids.to(device))
        length, whole = ids.shape[1], self.shapes.lengths[-1]
        rotary = self._model.rotary_emb(hidden, position_ids=torch.arange(whole - length, whole, device=device)[None])
        # The mask is always passed, even without padding: otherwise the layers would be compiled once more.
        is_earlier = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        is_seen = is_earlier & mask.to(device).bool()[:, None, None, :]  # [B, 1, T, T]
        states = [hidden]
        for layer in self._model.layers:
            states.append(layer(states[-1], attention_mask=is_seen, position_embeddings=rotary))
        return torch.stack([states[number] for number in self._hidden_layers], dim=2)

    def _padded(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Extend ``[B, T, layers, H]`` to ``[B, L, layers, H]``, with the padding's states at all padding positions."""
        assert self._padding is not None
        num_prompts, length = mask.shape
        is_prompt = mask.to(states.device).bool()[:, :, None, None]
        rest = self._padding.expand(num_prompts, self.shapes.lengths[-1] - length, -1, -1)
        return torch.cat([rest, torch.where(is_prompt, states, self._padding)], dim=1)


def fast_forward(
    model: Any,
    hidden_layers: Sequence[int],
    shapes: ShapeBuckets,
    exact: Forward,
    check_inputs: Sequence[Tokens],
    backend: CompilerBackend = "inductor",
    report: Report = ignore,
) -> Forward:
    """Create the fastest forward pass that agrees with ``exact``: trimmed and compiled, compiled, or ``exact`` itself.

    The results are compared on ``check_inputs``, batches of which the first has padding; the other arguments are those
    of ``FastLayers`` and of ``torch.compile``.

    Raises:
        NonFiniteStates: a forward pass gives infinite or NaN values; the layers are restored.
    """
    expected = [check_finite(exact(tokens)) for tokens in check_inputs]
    tolerance = TOLERANCES[expected[0].dtype]
    layers = FastLayers(model, hidden_layers, shapes, padding=expected[0][:1, :1])
    worst = worst_difference(layers, check_inputs, expected)
    if not worst <= tolerance:  # also NaN
        logger.warning("the trimmed text encoder differs by %.2g, more than rounding; prompts are padded", worst)
        layers = FastLayers(model, hidden_layers, shapes)
    warn_if_caches_unwritable()
    if not _is_compiled(layers, backend, report):
        return exact
    try:
        worst = worst_difference(layers, check_inputs, expected)
    except NonFiniteStates:
        layers.restore()
        raise
    if not worst <= tolerance:
        layers.restore()
        logger.warning("the compiled text encoder differs by %.2g, more than rounding; using performance=exact", worst)
        return exact
    return layers


def _is_compiled(layers: FastLayers, backend: CompilerBackend, report: Report) -> bool:
    """Compile ``layers``, and say in the log how it went."""
    began = time.monotonic()
    try:
        layers.compile(backend, report)
    except CompilationFailed as error:
        logger.warning("%s; using performance=exact", describe_failure("the text encoder", error))
        return False
    logger.info("the text encoder is compiled for %d shapes, in %.0f s", len(layers.shapes), time.monotonic() - began)
    return True


def worst_difference(forward: Forward, check_inputs: Sequence[Tokens], expected: Sequence[torch.Tensor]) -> float:
    """Return the largest ``difference`` over ``check_inputs``.

    Raises:
        NonFiniteStates: ``forward`` gives infinite or NaN values.
    """
    pairs = zip(check_inputs, expected, strict=True)
    return float(torch.stack([difference(check_finite(forward(tokens)), states) for tokens, states in pairs]).max())


def difference(states: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return the largest relative error of a token's hidden state, as a share of its norm."""
    states, expected = states.float(), expected.float()
    norms = expected.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)  # a padding token may have norm 0
    errors: torch.Tensor = (states - expected).norm(dim=-1) / norms
    return errors.max()


def _grown(rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Repeat the last of ``rows`` until there are ``num_rows``."""
    return torch.cat([rows, rows[-1:].expand(num_rows - len(rows), -1)])
