"""Applies a ``Performance`` to the parts of a model, once, after they are loaded."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch

from flux2_shared.model.compilation import CompilationFailed, describe_failure, eager_on_recompile
from flux2_shared.model.compile_cache import warn_if_caches_unwritable
from generator_service.pipelines.components import Components
from generator_service.pipelines.optimizations.attention import fastest_attention, use_attention
from generator_service.pipelines.optimizations.compiled_model import CompiledModel, ShapeKind
from generator_service.pipelines.optimizations.fp8 import quantize_blocks
from generator_service.pipelines.optimizations.offload import offload_blocks
from generator_service.pipelines.optimizations.profiles import Performance

logger = logging.getLogger("flux2")
Result = TypeVar("Result")
SEPARATE_PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


class Optimizations:
    """Components of a model, changed in place as ``performance`` says.

    Args:
        components: of one model, on its device.
        performance: what to do. What turns out to be impossible is left out, and ``performance`` then says so.
        num_tokens: of the picture that attention is measured for, with its text.
    """

    def __init__(self, components: Components, performance: Performance, num_tokens: int) -> None:
        self.performance = performance
        self._compiled: CompiledModel | None = None
        transformer, device = components.transformer, components.vae.device
        if "offload" in performance.optimizations:
            offload_blocks(transformer, device)
        if "attention" in performance.optimizations:
            use_attention(transformer, fastest_attention(transformer, num_tokens, device))
        if "fused_qkv" in performance.optimizations:
            fuse_projections(transformer)
        if "fp8" in performance.optimizations:
            self._quantize(transformer)
        if "vae" in performance.optimizations:
            components.vae.decoder.to(memory_format=torch.channels_last)
        if "compile" in performance.optimizations:
            warn_if_caches_unwritable()
            decoder = components.vae.decoder if "vae" in performance.optimizations else None
            self._compiled = CompiledModel(transformer, decoder, performance.backend, self._note_eager_decoder)

    @property
    def is_compiled(self) -> bool:
        """Whether there is anything to compile."""
        return self._compiled is not None

    def compiling(self, kind: ShapeKind) -> AbstractContextManager[None]:
        """Within the block what is drawn is compiled."""
        return nullcontext() if self._compiled is None else self._compiled.compiling(kind)

    def run_compiled(self, run: Callable[..., Result], kind: ShapeKind) -> Result:
        """The result of ``run(kind=kind)``; if the compiler fails, everything runs uncompiled from now on."""
        try:
            return run(kind=kind)
        except CompilationFailed as error:
            self.fall_back_to_eager(error)
        return run()

    def serving(self) -> AbstractContextManager[None]:
        """Within the block nothing is compiled."""
        return nullcontext() if self._compiled is None else eager_on_recompile()

    def fall_back_to_eager(self, error: Exception) -> None:
        """Go on without: the compiler has failed."""
        assert self._compiled is not None
        self._compiled.fall_back_to_eager()
        self._compiled = None
        self.performance = self.performance.without("compile", describe_failure("the model", error))
        logger.warning("%s", self.performance)

    def _note_eager_decoder(self, reason: Exception) -> None:
        """Log and keep why the decoder alone runs uncompiled."""
        line = f"{describe_failure('the decoder', reason)}: it runs uncompiled"
        self.performance = replace(self.performance, left_out=(*self.performance.left_out, line))
        logger.warning("%s", line)

    def _quantize(self, transformer: Any) -> None:
        try:
            quantize_blocks(transformer)
        except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
            logger.debug("torchao cannot do it here", exc_info=True)
            self.performance = self.performance.without("fp8", f"torchao cannot do it here ({type(error).__name__})")


def fuse_projections(transformer: Any) -> None:
    """Join queries, keys and values of the double-stream blocks into one product each, and free the separate ones."""
    for block in transformer.transformer_blocks:
        block.attn.fuse_projections()
        for name in SEPARATE_PROJECTIONS:
            delattr(block.attn, name)
