"""Compiles modules of a model in place with ``torch.compile``, for shapes that are known ahead.

Each shape is compiled separately while the service starts. Nothing is compiled while it serves, since that would block
all requests for seconds: within ``eager_on_recompile`` a shape that was not compiled runs eagerly.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

from flux2_shared.device.errors import is_device_lost, is_out_of_memory

MAX_SHAPES = 64
"""The most shapes compiled for one module; PyTorch's default of 8 is meant to detect accidental recompilation."""

CompilerBackend = str | Callable[..., Any]
"""As ``torch.compile``'s ``backend``."""


class CompilationFailed(Exception):
    """A module cannot be compiled or the compiled code fails, for example because there is no compiler."""


def compile_parts(parts: Sequence[nn.Module], backend: CompilerBackend = "inductor") -> None:
    """Have ``parts`` compiled when they first run with a shape; parts of the same class share the compiled code.

    Args:
        parts: the modules whose calls are compiled.
        backend: as for ``torch.compile``. ``eager`` captures graphs without compiling them, for tests.
    """
    for part in parts:
        part.compile(backend=backend, dynamic=False, fullgraph=True)


def restore_parts(parts: Sequence[nn.Module]) -> None:
    """Undo ``compile_parts``."""
    for part in parts:
        part._compiled_call_impl = None  # noqa: SLF001 - there is no public way back


@contextmanager
def compiling() -> Iterator[None]:
    """Allow new shapes of compiled modules to be compiled within the block, during startup.

    Raises:
        CompilationFailed: replaces any error in the block except out of memory and a lost device. Compilers fail in
            many ways, some of them only when the compiled code first runs. An error with another cause will occur again
            without compilation.
    """
    limits: dict[str, Any] = {"recompile_limit": MAX_SHAPES, "accumulated_recompile_limit": 4 * MAX_SHAPES}
    with torch._dynamo.config.patch(**limits):  # noqa: SLF001 - where PyTorch documents these settings
        try:
            yield
        except Exception as error:
            if is_out_of_memory(error) or is_device_lost(error):
                raise
            raise CompilationFailed from error


@contextmanager
def eager_on_recompile() -> Iterator[None]:
    """Run new shapes of compiled modules eagerly within the block, on all threads."""
    with torch.compiler.set_stance("eager_on_recompile"):
        yield


def num_compilations() -> int:
    """Return the number of graphs that this process has compiled."""
    return int(counters["stats"]["unique_graphs"])


def describe_failure(what: str, error: Exception) -> str:
    """Describe a failed compilation in one line, and log the details at level debug."""
    logging.getLogger("flux2").debug("%s could not be compiled", what, exc_info=error)
    cause = error.__cause__ or error
    cause = getattr(cause, "inner_exception", cause)
    first = (str(cause).strip().splitlines() or [""])[0]
    return f"{what} could not be compiled ({type(cause).__name__}: {first[:200]})"
