"""Compiling parts of a model in place with ``torch.compile``, for shapes that are known ahead.

Every shape is compiled by itself, while the service starts. Nothing is compiled while it serves, where it would stop
everyone for seconds: ``compiling_nothing_new`` runs a shape that was not compiled with the parts as they are.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

from shared.device_errors import is_device_lost, is_out_of_memory

MAX_SHAPES = 64
"""How many shapes of one part are kept compiled; PyTorch's own limit, 8, is meant to find mistakes."""

CompilerBackend = str | Callable[..., Any]
"""As ``torch.compile``'s ``backend``."""


class CompilationFailed(Exception):
    """A part cannot be compiled, or does not run as it was: there is no compiler, say, or none for this device."""


def compile_parts(parts: Sequence[nn.Module], backend: CompilerBackend = "inductor") -> None:
    """Have ``parts`` compiled when they first run with a shape; parts of the same class share the compiled code.

    Args:
        parts: their calls, not their parents', become compiled.
        backend: as ``torch.compile``'s. ``eager`` captures graphs and compiles none, for tests.
    """
    for part in parts:
        part.compile(backend=backend, dynamic=False, fullgraph=True)


def restore_parts(parts: Sequence[nn.Module]) -> None:
    """Undo ``compile_parts``."""
    for part in parts:
        part._compiled_call_impl = None  # noqa: SLF001 - there is no public way back


@contextmanager
def compiling() -> Iterator[None]:
    """Within the block every new shape of a compiled part is compiled: for the start of a service.

    Raises:
        CompilationFailed: instead of any error in the block but too little memory and a lost device. Compilers fail in
            many ways, some of them only when what they made is first run; what the error really was shows without
            compiling.
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
def compiling_nothing_new() -> Iterator[None]:
    """Within the block a new shape of a compiled part runs uncompiled. Other threads are affected, too."""
    with torch.compiler.set_stance("eager_on_recompile"):
        yield


def num_compilations() -> int:
    """How many graphs this process has compiled so far."""
    return int(counters["stats"]["unique_graphs"])


def log_failure(what: str, error: Exception) -> str:
    """A line for people about a failed compilation; the details go to the log at level debug."""
    logging.getLogger("flux2").debug("%s could not be compiled", what, exc_info=error)
    cause = error.__cause__ or error
    cause = getattr(cause, "inner_exception", cause)
    first = (str(cause).strip().splitlines() or [""])[0]
    return f"{what} could not be compiled ({type(cause).__name__}: {first[:200]})"
