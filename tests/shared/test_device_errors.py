"""Classification of errors. The texts were reported by users of PyTorch, or are from its sources."""

import errno
import pickle

import numpy as np
import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.exc import InductorError

from flux2_shared.device.errors import is_device_lost, is_out_of_memory
from flux2_shared.errors import OutOfMemory

ADVICE = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\n"
    "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)
NCCL = (
    "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:275, unhandled cuda error (run with NCCL_DEBUG=INFO "
    "for details), NCCL version 2.20.5\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
)
WORKER = (
    "Caught RuntimeError in pin memory thread for device 0.\nOriginal Traceback (most recent call last):\n  File x\n"
)

OUT_OF_MEMORY = [
    "CUDA out of memory. Tried to allocate 2.87 GiB (GPU 0; 14.76 GiB total capacity; 8.77 GiB already allocated)",
    "CUDA error: out of memory" + ADVICE,
    "CUDA driver error: out of memory",
    "cuda runtime error (2) : out of memory at /pytorch/aten/src/THC/THCTensorRandom.cu:25",
    "cudaErrorMemoryAllocation: out of memory",
    "CUDA_ERROR_OUT_OF_MEMORY: out of memory",
    "CUDA NVRTC error: NVRTC_ERROR_OUT_OF_MEMORY",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasGemmEx( handle, opa, opb, m, n, k, ...)`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasLtCreate(&handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "cuDNN Frontend error: [cudnn_frontend] Error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "[cudnn_frontend] Error: CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`. If you keep seeing this",
    "CUDA error: CUSPARSE_STATUS_ALLOC_FAILED when calling `cusparseCreate(handle)`",
    "cuFFT error: CUFFT_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
    NCCL + "Cuda failure 2 'out of memory'",
    NCCL + "Cuda failure 'out of memory'",
    NCCL + "Failed to CUDA calloc async 608 bytes",
    "NCCL error: unhandled cuda error: out of memory",
    "HIP out of memory. Tried to allocate 20.00 MiB",
    "MPS backend out of memory (MPS allocated: 8.88 GB, other allocations: 1.20 MB, max allowed: 9.07 GB).",
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 4",
    "[enforce fail at ..\\c10\\core\\CPUAllocator.cpp:72] data. DefaultCPUAllocator: not enough memory: you tried to",
    WORKER + "RuntimeError: CUDA error: out of memory",
]
DEVICE_LOST = [
    "CUDA error: device-side assert triggered" + ADVICE,
    "CUDA error: an illegal memory access was encountered\nSearch for `cudaErrorIllegalAddress' in https://docs.nvidia."
    "com/cuda/cuda-runtime-api/group__CUDART__TYPES.html for more information." + ADVICE,
    "CUDA error: misaligned address" + ADVICE,
    "CUDA error: an illegal instruction was encountered" + ADVICE,
    "CUDA error: unspecified launch failure" + ADVICE,
    "CUDA error: uncorrectable ECC error encountered" + ADVICE,
    "CUDA error: uncorrectable NVLink error detected during the execution" + ADVICE,
    "CUDA error: hardware stack error" + ADVICE,
    "CUDA error: invalid program counter" + ADVICE,
    "CUDA error: operation not supported on global/shared address space" + ADVICE,
    "CUDA error: the launch timed out and was terminated" + ADVICE,
    "CUDA error: unknown error" + ADVICE,
    "CUDA error: context is destroyed",
    "CUDA error: GPU has fallen off the bus",
    "CUDA driver error: unknown error",
    "CUDA driver error: an illegal memory access was encountered",
    "cuda runtime error (59) : device-side assert triggered at /pytorch/aten/src/THC/generic/THCTensorMath.cu:26",
    "Triton Error [CUDA]: an illegal memory access was encountered",
    "Triton Error [CUDA]: device-side assert triggered",
    "Triton Error [CUDA]: unspecified launch failure",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa, opb, m, n, k, &alpha, a, lda)`",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED_CUDA_DRIVER",
    "cuFFT error: CUFFT_EXEC_FAILED",
    "NCCL Error 1: unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
    NCCL + "Cuda failure 999 'unknown error'",
    WORKER + "RuntimeError: CUDA error: an illegal memory access was encountered",
]
ORDINARY = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x8 and 9x4)"),
    RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"),
    RuntimeError("CUDA error: invalid argument" + ADVICE),
    RuntimeError("CUDA error: no kernel image is available for execution on the device" + ADVICE),
    RuntimeError("Triton Error [CUDA]: invalid argument"),
    RuntimeError(
        "out of resource: shared memory, Required: 135200, Hardware limit: 101376. Reducing block sizes or `num_stages`"
    ),
    RuntimeError("No available kernel. Aborting execution."),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous"),
    RuntimeError(
        "CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasGemmEx( handle, opa, opb, m, n, k, ...)`"
    ),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSgemm( handle, opa, opb, m, n, k)`"),
    RuntimeError("Found no NVIDIA driver on your system."),
    RuntimeError("cannot open '/images/CUDA out of memory.png'"),
    RuntimeError("the prompt 'CUDA error: an illegal memory access was encountered' is too long"),
    RuntimeError("CUDA extension cannot read 'CUDA out of memory.bin'"),
    ValueError("CUDA out of memory"),
    ValueError("CUDA error: device-side assert triggered"),
    AssertionError("CUDA error: device-side assert triggered"),
    KeyError("CUDNN_STATUS_ALLOC_FAILED"),
    OSError(errno.ENOSPC, "No space left on device"),
    OSError("GPU is lost"),
    KeyboardInterrupt(),
]


def accelerator_error(text: str, code: int | None = None) -> torch.AcceleratorError:
    """An error with CUDA's code in its attribute, as PyTorch raises it."""
    error = torch.AcceleratorError(text)
    if code is not None:
        error.error_code = code  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize("text", OUT_OF_MEMORY)
@pytest.mark.parametrize("kind", [RuntimeError, torch.AcceleratorError])
def test_out_of_memory_is_recognized_by_its_text(text: str, kind: type[Exception]) -> None:
    """Messages about memory, of any library and device, are recognized, and are not a lost device."""
    assert is_out_of_memory(kind(text))
    assert not is_device_lost(kind(text))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        torch.cuda.OutOfMemoryError(),
        MemoryError(),
        np._core._exceptions._ArrayMemoryError((2**40,), np.dtype(float)),  # type: ignore[attr-defined]
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        accelerator_error("CUDA error: out of memory", 2),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_is_recognized_by_its_type(error: Exception) -> None:
    """Errors with their own type or code need no text."""
    assert is_out_of_memory(error)
    assert not is_device_lost(error)


def test_the_cpu_really_runs_out_of_memory() -> None:
    """The error that PyTorch raises on this machine for an impossible allocation is recognized."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize("text", DEVICE_LOST)
@pytest.mark.parametrize("kind", [RuntimeError, torch.AcceleratorError])
def test_a_lost_device_is_recognized_by_its_text(text: str, kind: type[Exception]) -> None:
    """Errors after which every further call fails are recognized, whichever library reports them first."""
    assert is_device_lost(kind(text))
    assert not is_out_of_memory(kind(text))


@pytest.mark.parametrize(
    "code", [3, 4, 46, 214, 220, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 911, 999, 12345]
)
def test_a_lost_device_is_recognized_by_its_code(code: int) -> None:
    """A code that is not known to be harmless counts as a sticky error, whatever its text."""
    assert is_device_lost(accelerator_error("CUDA error: something new", code))
    assert is_device_lost(pickle.loads(pickle.dumps(accelerator_error("CUDA error: something new", code))))


@pytest.mark.parametrize(
    "code", [1, 2, 9, 98, 100, 101, 200, 209, 218, 400, 500, 600, 701, 712, 800, 801, 900, 901, 910]
)
def test_other_codes_leave_the_device_usable(code: int) -> None:
    """Invalid arguments, kernels for other devices and lack of memory end a call, not the process."""
    assert not is_device_lost(accelerator_error("CUDA error: something", code))


@pytest.mark.parametrize("error", ORDINARY, ids=lambda error: f"{type(error).__name__} {error}"[:40])
def test_ordinary_errors_are_neither_kind(error: BaseException) -> None:
    """Programming errors, and messages that quote such a text, are ordinary errors."""
    assert not is_out_of_memory(error)
    assert not is_device_lost(error)


def test_an_accelerator_error_without_a_code_is_classified_by_its_text() -> None:
    """An unknown text counts as a sticky error, a text about a wrong argument does not."""
    assert is_device_lost(torch.AcceleratorError("CUDA error: driver shutting down"))
    assert not is_device_lost(torch.AcceleratorError("CUDA error: invalid configuration argument" + ADVICE))
    assert not is_device_lost(torch.AcceleratorError("CUDA error: operation not supported" + ADVICE))


@pytest.mark.parametrize("compiler", [BackendCompilerFailed, InductorError])
def test_errors_are_unwrapped_from_those_of_compilers(compiler: type[Exception]) -> None:
    """The original error is looked up inside a compiler's error, and in the causes of an exception."""
    inner = RuntimeError("Triton Error [CUDA]: out of memory")
    wrapped = compiler("inductor", inner, None) if compiler is BackendCompilerFailed else compiler(inner, None)
    assert is_out_of_memory(wrapped)
    outer = ValueError("the service cannot start")
    outer.__cause__ = wrapped
    assert is_out_of_memory(outer)
    assert not is_device_lost(outer)


def raised_while_handling(first: Exception, second: Exception) -> Exception:
    """``second``, raised by the code that handles ``first``."""
    try:
        try:
            raise first
        except type(first):
            raise second  # noqa: B904 - the test is about errors that are not raised from each other
    except type(second) as error:
        return error


def test_a_mistake_in_a_fallback_is_not_a_lack_of_memory() -> None:
    """An error that occurs while another is handled is classified by itself, unless it is raised from the other."""
    mistake = raised_while_handling(torch.OutOfMemoryError("CUDA out of memory."), KeyError("fallback"))
    assert not is_out_of_memory(mistake)
    mistake.__cause__ = mistake.__context__
    assert is_out_of_memory(mistake)


def test_a_lost_device_stays_lost() -> None:
    """If an error occurs while a sticky error is handled, with or without its own cause, the device is lost."""
    sticky = accelerator_error("CUDA error: an illegal memory access was encountered", 700)
    assert is_device_lost(raised_while_handling(sticky, KeyError("cleanup")))
    refusal = OutOfMemory("an image does not fit")
    refusal.__cause__ = raised_while_handling(sticky, torch.OutOfMemoryError("CUDA out of memory."))
    assert is_device_lost(refusal)
    assert is_out_of_memory(refusal)


def test_a_cyclic_chain_of_causes_ends() -> None:
    """Errors that are each other's cause are each checked once."""
    first, second = RuntimeError("one"), RuntimeError("two")
    first.__cause__, second.__cause__ = second, first
    assert not is_out_of_memory(first)
    assert not is_device_lost(first)
