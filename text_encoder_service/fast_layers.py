"""The decoder layers as the profile ``fast`` runs them: compiled, and without most of the padding.

FLUX.2 pads prompts on the left to 512 tokens. Nothing attends to padding, and padding attends to nothing: attention
(PyTorch's SDPA; not so transformers' eager one) gives 0 for it, so its hidden states depend on its own embedding alone
and are the same in every place of every prompt. Computing the prompt's tokens, at the positions that they have in the
padded prompt, and copying the hidden states of one padding token into the rest is the same as computing it all.

What comes out equals the library's forward pass up to rounding; ``fast_forward`` sees to it on the checkpoint that is
served, before it is served. Knows nothing of prompts.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shared.attention import NonFiniteStates, check_finite
from shared.compilation import (
    Backend,
    CompilationFailed,
    compile_parts,
    compiling,
    describe_failure,
    eager_on_recompile,
    restore_parts,
)
from shared.compile_cache import warn_if_caches_unwritable
from shared.report import Report, ignore
from text_encoder_service.shapes import ShapeBuckets

logger = logging.getLogger("flux2")

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.15}
"""How far hidden states may lie from the library's and still be called rounding (see ``difference``).

30 layers of random weights, compiled and not, differed by 6e-6 in float32 and 0.08 in bfloat16; another token in the
prompt's place made a difference of 0.24 at least, as any mistake in mask or positions would.
"""


@dataclass(frozen=True)
class Tokens:
    """Tokenised prompts, padded on the left to the full length."""

    ids: torch.Tensor
    """``[B, L]``, on the CPU."""
    mask: torch.Tensor
    """``[B, L]``, on the CPU: 1 where a token is the prompt's, 0 where it is padding."""

    @property
    def longest(self) -> int:
        """How many tokens the longest prompt has, without padding."""
        return int(self.mask.sum(dim=1).max())

    def halves(self) -> tuple["Tokens", "Tokens"]:
        """The first half of the prompts, which is the smaller one, and the others."""
        middle = len(self.ids) // 2
        return Tokens(self.ids[:middle], self.mask[:middle]), Tokens(self.ids[middle:], self.mask[middle:])


Forward = Callable[[Tokens], torch.Tensor]
"""Tokens to the wanted hidden states, ``[B, L, layers, H]`` on the model's device."""


class FastLayers:
    """A ``Forward`` through batches of few sizes, all of them as long as the longest prompt needs.

    Args:
        model: the language model whose layers run.
        hidden_layers: the hidden states that are wanted, counted from 0 = the token embeddings.
        shapes: with what shapes they run; the longest of their lengths is L.
        padding: the hidden states of any padding token ``[1, 1, layers, H]``, or None: those that come out are kept.
    """

    def __init__(
        self, model: Any, hidden_layers: Sequence[int], shapes: ShapeBuckets, padding: torch.Tensor | None = None
    ) -> None:
        self._model = model
        self._hidden_layers = hidden_layers
        self.shapes = shapes if padding is not None else shapes.untrimmed()
        self._padding = padding

    def __call__(self, tokens: Tokens) -> torch.Tensor:
        """Run one batch; what was not compiled runs uncompiled."""
        num_prompts = len(tokens.ids)
        batch, length = self.shapes.bucket_for(num_prompts, tokens.longest)
        ids, mask = (_grown(rows[:, -length:], batch) for rows in (tokens.ids, tokens.mask))
        with eager_on_recompile():
            states = self._run(ids, mask)[:num_prompts]
        return states if self._padding is None else self._padded(states, tokens.mask[:, -length:])

    def compile(self, backend: Backend, report: Report = ignore) -> None:
        """Compile the layers, in place, for all shapes; ``report`` gets the progress.

        Raises:
            CompilationFailed: it does not work here; the layers are as they were.
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
        """The layers as they were before ``compile``."""
        restore_parts(list(self._model.layers))

    def _run(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """``[B, T]`` to ``[B, T, layers, H]``. The model's own loop would record states by hooks in compiled code."""
        device = self._model.device
        hidden = self._model.embed_tokens(ids.to(device))
        length, whole = ids.shape[1], self.shapes.lengths[-1]
        rotary = self._model.rotary_emb(hidden, position_ids=torch.arange(whole - length, whole, device=device)[None])
        # Always a mask, also where nothing is padded: without one the layers would be compiled once more.
        is_earlier = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        is_seen = is_earlier & mask.to(device).bool()[:, None, None, :]  # [B, 1, T, T]
        states = [hidden]
        for layer in self._model.layers:
            states.append(layer(states[-1], attention_mask=is_seen, position_embeddings=rotary))
        return torch.stack([states[number] for number in self._hidden_layers], dim=2)

    def _padded(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """``[B, T, layers, H]`` to ``[B, L, layers, H]``, with the same states in all places of padding."""
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
    backend: Backend = "inductor",
    report: Report = ignore,
) -> Forward:
    """Fast layers that give what ``exact`` gives: trimmed and compiled, else compiled, else ``exact`` itself.

    Args:
        model: as ``FastLayers``' are the next two.
        hidden_layers: see there.
        shapes: see there.
        exact: the library's forward pass.
        check_inputs: prompts to compare by; the first has padding.
        backend: as ``torch.compile``'s.
        report: gets the progress.

    Raises:
        NonFiniteStates: one of them gives values that are not finite numbers; the layers are as they were.
    """
    expected = [check_finite(exact(tokens)) for tokens in check_inputs]
    tolerance = TOLERANCES[expected[0].dtype]
    layers = FastLayers(model, hidden_layers, shapes, padding=expected[0][:1, :1])
    worst = worst_difference(layers, check_inputs, expected)
    if not worst <= tolerance:  # also NaN
        logger.warning("the text encoder trimmed is off by %.2g, more than rounding: prompts are padded", worst)
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
        logger.warning("the compiled text encoder is off by %.2g, more than rounding: performance is exact", worst)
        return exact
    return layers


def _is_compiled(layers: FastLayers, backend: Backend, report: Report) -> bool:
    """Compile ``layers``, and say in the log how it went."""
    began = time.monotonic()
    try:
        layers.compile(backend, report)
    except CompilationFailed as error:
        logger.warning("%s: performance is exact", describe_failure("the text encoder", error))
        return False
    logger.info("the text encoder is compiled for %d shapes, in %.0f s", len(layers.shapes), time.monotonic() - began)
    return True


def worst_difference(forward: Forward, check_inputs: Sequence[Tokens], expected: Sequence[torch.Tensor]) -> float:
    """The largest ``difference`` over ``check_inputs``.

    Raises:
        NonFiniteStates: a value that ``forward`` gives is not a finite number.
    """
    pairs = zip(check_inputs, expected, strict=True)
    return float(torch.stack([difference(check_finite(forward(tokens)), states) for tokens, states in pairs]).max())


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """How far a token's hidden state lies from where it should, as a share of its norm; the largest of all."""
    ours, theirs = ours.float(), theirs.float()
    lengths = theirs.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)  # a padding token's may be 0
    shares: torch.Tensor = (ours - theirs).norm(dim=-1) / lengths
    return shares.max()


def _grown(rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """``rows``, the last one repeated until there are ``num_rows``."""
    return torch.cat([rows, rows[-1:].expand(num_rows - len(rows), -1)])
