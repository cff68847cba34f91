"""Classifies errors: out of memory, or a device that this process can no longer use.

PyTorch has exception types for some of them only. cuBLAS, cuDNN, NCCL, Triton and the CPU allocator report both by
``RuntimeError``, so its message is parsed. Only lines that start like a report of these libraries count, so that a
message that quotes a prompt or a file name is not misclassified. Check ``is_device_lost`` first: a chain of errors may
contain both.
"""

import errno
import re
from collections.abc import Iterator

import torch

OUT_OF_MEMORY_CODE = 2
"""``cudaErrorMemoryAllocation``."""
NON_STICKY_CODES = frozenset(
    [
        *(1, OUT_OF_MEMORY_CODE, *range(5, 46)),  # invalid values, configurations and pointers, profiler, old driver
        *(*range(47, 127), 200),  # launches nested too deep, no such function or device, invalid kernel image
        *(*range(205, 214), *range(215, 220), *range(221, 226)),  # mapped arrays, kernels of other devices, peers, PTX
        *(*range(300, 304), 400, 401, 500, 600, 701, 703),  # files, handles and symbols, not ready, launch too large
        *(704, 705, 708, 711, 712, 713, 720),  # peers and host memory that are registered, or are not
        *(800, 801, *range(900, 911), *range(912, 916)),  # not permitted or supported, captures of graphs, clusters
    ]
)
"""CUDA error codes after which the context remains usable. All other codes are assumed to be sticky."""
NON_STICKY_TEXTS = re.compile(
    "invalid (argument|configuration|device|resource)|kernel image|operation not (supported|permitted)|symbol not found"
    "|device not ready|too many resources requested|no CUDA-capable device|driver version is insufficient|peer access"
)
"""The most frequent of these errors by message, for an ``AcceleratorError`` without a code."""

_TYPE = r"(?:[\w.]+(?:Error|Exception): )?"
"""The exception type, which precedes the message in tracebacks such as those of worker processes."""
_REPORT = (
    rf"^{_TYPE}(?:\[\w+\] ?)*(?:Error: )?(?:CUDA|cuDNN|cuBLAS|cuSOLVER|cuSPARSE|cuFFT|cuRAND|NCCL|HIP|Triton Error)"
)
"""The beginning of a report by a device library, before which no other text is quoted."""
_OUT_OF_MEMORY = re.compile(
    rf"{_REPORT}[^\n'\"]*?(out.of.memory|MemoryAllocation|_ALLOC\w*_FAILED"
    r"|NOT_INITIALIZED when calling `cublas\w*Create)"
    r"|^Cuda failure (\d+ )?'out of memory'|^Failed to CUDA (m|c|host )alloc"  # NCCL's last error
    rf"|^{_TYPE}(XPU|MPS backend) out of memory"
    rf"|^{_TYPE}(\[enforce fail at [^\]\n]*\][^\n]*?)?DefaultCPUAllocator: (can't allocate|not enough) memory",
    re.IGNORECASE | re.MULTILINE,
)
_DEVICE_LOST = re.compile(
    rf"{_REPORT}[^\n'\"]*?(device-side assert triggered|illegal memory access|misaligned address|illegal instruction"
    "|unspecified launch failure|uncorrectable ECC|uncorrectable NVLink|hardware stack error|invalid program counter"
    "|not supported on global/shared address space|launch timed out|context is destroyed|fallen off the bus|GPU is lost"
    "|device lost|error: unknown error|unhandled cuda error|_EXECUTION_FAILED|_EXEC_FAILED)",
    re.IGNORECASE | re.MULTILINE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the device or the host is out of memory.

    An error that ``error`` was explicitly raised from, or that a compiler wrapped, counts as well. An error that was
    merely being handled when ``error`` was raised does not: a bug in a fallback is not a lack of memory.
    """
    return any(_reports_no_memory(each) for each in _chain(error, with_context=False))


def is_device_lost(error: BaseException) -> bool:
    """Return whether an error means that the device's context is corrupted, so that all further calls fail.

    An error that was being handled when ``error`` was raised counts as well, since the context does not recover.
    """
    return any(_reports_lost_device(each) for each in _chain(error, with_context=True))


def _chain(error: BaseException, *, with_context: bool) -> Iterator[BaseException]:
    """Yield ``error`` and its causes, each once."""
    stack, seen = [error], set[int]()
    while stack:
        each = stack.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        causes = (each.__cause__, getattr(each, "inner_exception", None), each.__context__ if with_context else None)
        stack.extend(cause for cause in causes if isinstance(cause, BaseException))


def _reports_no_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    code = _code_of(error)
    if code is not None:
        return code == OUT_OF_MEMORY_CODE
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


def _reports_lost_device(error: BaseException) -> bool:
    if not isinstance(error, RuntimeError) or _reports_no_memory(error):
        return False
    code, text = _code_of(error), str(error)
    if code is not None:
        return code not in NON_STICKY_CODES
    if _DEVICE_LOST.search(text):
        return True
    return isinstance(error, torch.AcceleratorError) and NON_STICKY_TEXTS.search(text) is None


def _code_of(error: BaseException) -> int | None:
    """Return the CUDA runtime's error code. PyTorch sets this attribute after construction, so it may be missing."""
    code = getattr(error, "error_code", None)
    return code if isinstance(error, torch.AcceleratorError) and isinstance(code, int) else None
