"""Applies the optimizations of a ``Performance`` to loaded components."""

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
    """The optimizations of a model, applied to its components in place.

    Args:
        components: components on their device.
        performance: optimizations to apply. The attribute ``performance`` omits those that failed, with the reason.
        num_tokens: number of image and text tokens for which attention backends are measured.
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
        return self._compiled is not None

    def compiling(self, kind: ShapeKind) -> AbstractContextManager[None]:
        """Compile the model for the shapes that run within the block."""
        return nullcontext() if self._compiled is None else self._compiled.compiling(kind)

    def run_compiled(self, run: Callable[..., Result], kind: ShapeKind) -> Result:
        """Return ``run(kind=kind)``. If compilation fails, disable it and return ``run()``."""
        try:
            return run(kind=kind)
        except CompilationFailed as error:
            self.fall_back_to_eager(error)
        return run()

    def serving(self) -> AbstractContextManager[None]:
        """Compile nothing within the block."""
        return nullcontext() if self._compiled is None else eager_on_recompile()

    def fall_back_to_eager(self, error: Exception) -> None:
        """Run the whole model uncompiled after ``error``."""
        assert self._compiled is not None
        self._compiled.fall_back_to_eager()
        self._compiled = None
        self.performance = self.performance.without("compile", describe_failure("the model", error))
        logger.warning("%s", self.performance)

    def _note_eager_decoder(self, reason: Exception) -> None:
        """Record and log why the decoder runs uncompiled."""
        line = f"{describe_failure('the decoder', reason)}: it runs uncompiled"
        self.performance = replace(self.performance, left_out=(*self.performance.left_out, line))
        logger.warning("%s", line)

    def _quantize(self, transformer: Any) -> None:
        try:
            quantize_blocks(transformer)
        except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
            logger.debug("torchao failed", exc_info=True)
            self.performance = self.performance.without("fp8", f"torchao failed ({type(error).__name__})")


def fuse_projections(transformer: Any) -> None:
    """Fuse the query, key and value projections of the double-stream blocks, and free the separate weights."""
    for block in transformer.transformer_blocks:
        block.attn.fuse_projections()
        for name in SEPARATE_PROJECTIONS:
            delattr(block.attn, name)
