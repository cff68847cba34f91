"""Out-of-memory errors as the libraries raise them."""

from collections.abc import Callable

import pytest
import torch
from torch._inductor.exc import InductorError


def accelerator_error() -> torch.AcceleratorError:
    """An error with CUDA's code in its attribute, as PyTorch raises it."""
    error = torch.AcceleratorError("CUDA error: out of memory")
    error.error_code = 2  # type: ignore[attr-defined]
    return error


KINDS: dict[str, Callable[[], Exception]] = {
    "torch": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB at 0x7f"),
    "cublas": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cudnn": lambda: RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "triton": lambda: RuntimeError("Triton Error [CUDA]: out of memory"),
    "nccl": lambda: RuntimeError("NCCL Error 1: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
    "accelerator": accelerator_error,
    "compiler": lambda: InductorError(RuntimeError("Triton Error [CUDA]: out of memory"), None),
    "host": MemoryError,
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
