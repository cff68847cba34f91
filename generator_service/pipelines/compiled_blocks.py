"""The transformer's repeated blocks, compiled: each known shape by itself, and once more for all the others.

Only the blocks are compiled. What a reused step runs lies outside of them, and so do LeMiCa's hooks, so computing,
reusing and the number of steps never ask for another graph. Blocks of one class share their code: two graphs a shape.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch.fx.experimental import _config as shapes_config

from shared.compilation import Backend, compiling

Shape = tuple[int, int, int]
"""Rows, image tokens with those of references, text tokens."""
Calls = list[Callable[..., Any]]
Kind = Literal["this", "any"]


class CompiledBlocks:
    """Chooses, before each forward pass of a transformer, what its blocks run.

    Args:
        transformer: diffusers' ``Flux2Transformer2DModel``; it keeps a hook until ``restore``.
        backend: as ``torch.compile``'s.
    """

    def __init__(self, transformer: Any, backend: Backend) -> None:
        self._blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        self._of_this_shape = self._compiled(backend, is_dynamic=False)
        self._of_any_shape = self._compiled(backend, is_dynamic=True)
        self._known: set[Shape] = set()
        self._prepares: Kind | None = None
        self._hook = transformer.register_forward_pre_hook(self._choose, with_kwargs=True)

    def _compiled(self, backend: Backend, *, is_dynamic: bool) -> Calls:
        """``torch.compile`` keeps what it makes for the two apart: their backends are not equal."""
        own = backend if isinstance(backend, str) else partial(backend)  # PyTorch's own knows ``dynamic``
        return [
            torch.compile(block._call_impl, backend=own, dynamic=is_dynamic, fullgraph=True)  # noqa: SLF001
            for block in self._blocks
        ]

    @contextmanager
    def preparing(self, kind: Kind) -> Iterator[None]:
        """Within the block what runs is compiled: for its shape alone (``this``), or for ``any``."""
        self._prepares = kind
        try:
            # Numbers that happen to be equal, like text tokens and channels, are not taken to be the same one.
            with compiling(), shapes_config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
                yield
        finally:
            self._prepares = None

    def restore(self) -> None:
        """Let the blocks run as they were."""
        self._hook.remove()
        self._use([None] * len(self._blocks))

    def _choose(self, _transformer: Any, _args: Any, arguments: dict[str, Any]) -> None:
        rows, image_tokens, _ = arguments["hidden_states"].shape
        shape = (rows, image_tokens, arguments["encoder_hidden_states"].shape[1])
        if self._prepares == "this":
            self._known.add(shape)
        is_known = shape in self._known and self._prepares != "any"
        self._use(self._of_this_shape if is_known else self._of_any_shape)

    def _use(self, calls: Any) -> None:
        for block, call in zip(self._blocks, calls, strict=True):
            block._compiled_call_impl = call  # noqa: SLF001 - where Module.compile() puts it
