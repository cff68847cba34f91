"""Compiles the transformer's blocks and the decoder: statically for known shapes, dynamically for all others.

Only these are compiled. Reused steps and LeMiCa's hooks run outside of the blocks, so neither they nor the number of
steps cause recompilation. Blocks of one class share their code, so a shape needs two graphs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as shapes_config

from flux2_shared.device.errors import is_device_lost, is_out_of_memory
from flux2_shared.model.compilation import CompilerBackend, compiling

Call = Callable[..., Any]
Shape = tuple[int, ...]
ShapeKind = Literal["static", "dynamic"]


class Graphs:
    """Static and dynamic compiled code of some modules.

    Args:
        modules: modules that run with inputs of the same shape.
        backend: passed to ``torch.compile``.
    """

    def __init__(self, modules: Sequence[nn.Module], backend: CompilerBackend) -> None:
        self._static = compiled_calls(modules, backend, is_dynamic=False)
        self._dynamic = compiled_calls(modules, backend, is_dynamic=True)
        self._static_shapes: set[Shape] = set()

    def calls(self, shape: Shape, compiles: ShapeKind | None) -> list[Call]:
        """Return the compiled call of each module.

        Args:
            shape: the shape that the code is specialized for.
            compiles: the kind that is compiled now; None if nothing is compiled.
        """
        if compiles == "static":
            self._static_shapes.add(shape)
        is_static = shape in self._static_shapes and compiles != "dynamic"
        return self._static if is_static else self._dynamic


class CompiledModel:
    """Dispatches the blocks of a transformer, and a decoder, to compiled code.

    Args:
        transformer: diffusers' ``Flux2Transformer2DModel``; has a hook until ``fall_back_to_eager``.
        decoder: diffusers' ``Decoder``; None if it is not compiled.
        backend: passed to ``torch.compile``.
        on_eager_decoder: called with the reason if the decoder falls back to eager.
    """

    def __init__(
        self,
        transformer: Any,
        decoder: Any,
        backend: CompilerBackend,
        on_eager_decoder: Callable[[Exception], None],
    ) -> None:
        self._blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        self._block_graphs = Graphs(self._blocks, backend)
        self._compiles: ShapeKind | None = None
        self._hook = transformer.register_forward_pre_hook(self._choose, with_kwargs=True)
        self._decoder = decoder
        self._on_eager_decoder = on_eager_decoder
        if decoder is not None:
            self._decoder_graphs = Graphs([decoder], backend)
            replace_calls([decoder], [self._decode])

    @contextmanager
    def compiling(self, kind: ShapeKind) -> Iterator[None]:
        """Compile for the shapes that run within the block (``static``) or for all other shapes (``dynamic``)."""
        self._compiles = kind
        try:
            # Without duck shapes: sizes that happen to be equal, like text tokens and channels, are independent.
            with compiling(), shapes_config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
                yield
        finally:
            self._compiles = None

    def fall_back_to_eager(self) -> None:
        """Run all modules uncompiled."""
        self._hook.remove()
        replace_calls(self._blocks, [None] * len(self._blocks))
        if self._decoder is not None:
            replace_calls([self._decoder], [None])

    def _choose(self, _transformer: Any, _args: Any, arguments: dict[str, Any]) -> None:
        rows, image_tokens, _ = arguments["hidden_states"].shape  # including tokens of reference images
        shape = (rows, image_tokens, arguments["encoder_hidden_states"].shape[1])
        replace_calls(self._blocks, self._block_graphs.calls(shape, self._compiles))

    def _decode(self, latents: Tensor) -> Tensor:
        """Run the compiled decoder; fall back to eager if it cannot be compiled or its output is not finite."""
        (call,) = self._decoder_graphs.calls(tuple(latents.shape), self._compiles)
        try:
            decoded: Tensor = call(latents)
        except Exception as error:
            if self._compiles is None or is_out_of_memory(error) or is_device_lost(error):
                raise
            return self._decode_eagerly(latents, error)
        if is_finite(decoded) or not is_finite(latents):
            return decoded
        return self._decode_eagerly(latents, ArithmeticError("its output is not finite"))

    def _decode_eagerly(self, latents: Tensor, reason: Exception) -> Tensor:
        decoded: Tensor = self._decoder._call_impl(latents)  # noqa: SLF001 - the uncompiled call
        if is_finite(decoded):  # so the compiled code is at fault
            replace_calls([self._decoder], [None])
            self._on_eager_decoder(reason)
        return decoded


def compiled_calls(modules: Sequence[nn.Module], backend: CompilerBackend, *, is_dynamic: bool) -> list[Call]:
    """Compile a call for each module. Unequal backends make ``torch.compile`` separate static and dynamic code."""
    callable_backend = (
        backend if isinstance(backend, str) else partial(backend)
    )  # built-in backends distinguish ``dynamic``
    return [
        torch.compile(module._call_impl, backend=callable_backend, dynamic=is_dynamic, fullgraph=True)  # noqa: SLF001
        for module in modules
    ]


def replace_calls(modules: Sequence[nn.Module], calls: Sequence[Call | None]) -> None:
    """Set the compiled call of each module; None to run it uncompiled."""
    for module, call in zip(modules, calls, strict=True):
        module._compiled_call_impl = call  # noqa: SLF001 - where Module.compile() puts it


def is_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite, without allocating a tensor of the same size."""
    return bool(torch.stack(tensor.aminmax()).isfinite().all())
