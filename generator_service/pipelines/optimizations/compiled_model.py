"""A model's repeated blocks and its decoder, compiled: each known shape by itself, and once more for all the others.

Only these are compiled. What a reused step runs lies outside of them, and so do LeMiCa's hooks, so computing, reusing
and the number of steps never ask for another graph. Blocks of one class share their code: two graphs a shape.
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
    """What some modules run for inputs of a shape.

    Args:
        modules: they run for inputs of the same shape, one after the other.
        backend: as ``torch.compile``'s.
    """

    def __init__(self, modules: Sequence[nn.Module], backend: CompilerBackend) -> None:
        self._static = compiled_calls(modules, backend, is_dynamic=False)
        self._dynamic = compiled_calls(modules, backend, is_dynamic=True)
        self._static_shapes: set[Shape] = set()

    def calls(self, shape: Shape, compiles: ShapeKind | None) -> list[Call]:
        """The compiled calls of the modules.

        Args:
            shape: what the modules' own code depends on.
            compiles: what they are compiled for now; None: they are only run.
        """
        if compiles == "static":
            self._static_shapes.add(shape)
        is_static = shape in self._static_shapes and compiles != "dynamic"
        return self._static if is_static else self._dynamic


class CompiledModel:
    """Chooses what the blocks of a transformer, and a decoder, run.

    Args:
        transformer: diffusers' ``Flux2Transformer2DModel``; it keeps a hook until ``fall_back_to_eager``.
        decoder: diffusers' ``Decoder``, or None: it is not compiled.
        backend: as ``torch.compile``'s.
        on_eager_decoder: called with the reason if the decoder alone runs as it was from now on.
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
        """Within the block, what runs is compiled: for its shape alone (``static``) or for all others (``dynamic``)."""
        self._compiles = kind
        try:
            # Numbers that happen to be equal, like text tokens and channels, are not taken to be the same one.
            with compiling(), shapes_config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
                yield
        finally:
            self._compiles = None

    def fall_back_to_eager(self) -> None:
        """Let everything run as it was."""
        self._hook.remove()
        replace_calls(self._blocks, [None] * len(self._blocks))
        if self._decoder is not None:
            replace_calls([self._decoder], [None])

    def _choose(self, _transformer: Any, _args: Any, arguments: dict[str, Any]) -> None:
        rows, image_tokens, _ = arguments["hidden_states"].shape  # the tokens of reference images included
        shape = (rows, image_tokens, arguments["encoder_hidden_states"].shape[1])
        replace_calls(self._blocks, self._block_graphs.calls(shape, self._compiles))

    def _decode(self, latents: Tensor) -> Tensor:
        """The decoder's compiled call. Without it, if it cannot be compiled or makes of numbers what is none."""
        (call,) = self._decoder_graphs.calls(tuple(latents.shape), self._compiles)
        try:
            decoded: Tensor = call(latents)
        except Exception as error:
            if self._compiles is None or is_out_of_memory(error) or is_device_lost(error):
                raise
            return self._eagerly_decoded(latents, error)
        if is_finite(decoded) or not is_finite(latents):
            return decoded
        return self._eagerly_decoded(latents, ArithmeticError("its output is not finite"))

    def _eagerly_decoded(self, latents: Tensor, reason: Exception) -> Tensor:
        decoded: Tensor = self._decoder._call_impl(latents)  # noqa: SLF001 - what is called without compiling
        if is_finite(decoded):  # so it was the compiled code's fault
            replace_calls([self._decoder], [None])
            self._on_eager_decoder(reason)
        return decoded


def compiled_calls(modules: Sequence[nn.Module], backend: CompilerBackend, *, is_dynamic: bool) -> list[Call]:
    """What the modules may run. ``torch.compile`` keeps static and dynamic code apart: their backends are not equal."""
    own = backend if isinstance(backend, str) else partial(backend)  # PyTorch's own knows ``dynamic``
    return [
        torch.compile(module._call_impl, backend=own, dynamic=is_dynamic, fullgraph=True)  # noqa: SLF001
        for module in modules
    ]


def replace_calls(modules: Sequence[nn.Module], calls: Sequence[Call | None]) -> None:
    """Have each module run one of ``calls``; None: its own."""
    for module, call in zip(modules, calls, strict=True):
        module._compiled_call_impl = call  # noqa: SLF001 - where Module.compile() puts it


def is_finite(tensor: Tensor) -> bool:
    """Whether every value is a finite number, in one pass over the tensor that allocates nothing as large."""
    return bool(torch.stack(tensor.aminmax()).isfinite().all())
