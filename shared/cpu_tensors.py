"""Reads and copies tensors in CPU memory with numpy, for threads other than the one that owns the device.

Above 32 768 elements torch's own operations (``isfinite``, ``clone``, ``cat``, ``to``) start an OpenMP thread pool for
the thread that calls them. As long as that thread lives, its pool competes with the device thread's pool for the same
cores. numpy's operations run on the calling thread alone, and release the interpreter's lock.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

EXPONENT_BITS = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000}
"""All set in infinities and NaNs, and in nothing else. The keys are the dtypes that this module takes."""
SIGNED = {2: np.int16, 4: np.int32}
UNSIGNED = {2: np.uint16, 4: np.uint32}
HASHED_AT_ONCE = 2**17
"""Elements, so that their float32 copy stays in the CPU's cache."""


def bit_patterns(tensor: torch.Tensor) -> NDArray[np.unsignedinteger]:
    """A view of the tensor's elements as unsigned integers, in its own shape; numpy has no bfloat16."""
    integers = {2: torch.int16, 4: torch.int32}[tensor.itemsize]
    patterns: NDArray[np.unsignedinteger] = tensor.detach().view(integers).numpy().view(UNSIGNED[tensor.itemsize])
    return patterns


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is infinite or NaN; as ``torch.isfinite(tensor).all()``, for at least one element.

    Without the sign, bit patterns are in the order of the magnitudes, and those of infinities and NaNs come last. Read
    as signed integers the largest pattern is a positive one; read as unsigned integers it is a negative one, if any.
    Two maxima therefore suffice, without a temporary array.
    """
    patterns, exponent = bit_patterns(tensor), EXPONENT_BITS[tensor.dtype]
    sign = 1 << (8 * tensor.itemsize - 1)
    return int(patterns.view(SIGNED[tensor.itemsize]).max()) < exponent and int(patterns.max()) < sign | exponent


def concatenate(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """As ``torch.cat`` along the first dimension, for tensors of one dtype; a single one is returned as it is."""
    if len(tensors) == 1:
        return tensors[0]
    joined = np.concatenate([bit_patterns(tensor) for tensor in tensors])
    return torch.from_numpy(joined).view(tensors[0].dtype)


def compact(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, contiguous, in a storage that holds nothing else; the tensor itself if it is so already."""
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return torch.from_numpy(bit_patterns(tensor).copy(order="C")).view(tensor.dtype)


def float32_sha256(tensor: torch.Tensor) -> str:
    """The SHA-256 of the elements as float32, in hexadecimal; equal for equal values of any of the dtypes."""
    digest = hashlib.sha256()
    patterns = bit_patterns(tensor).reshape(-1)
    for start in range(0, patterns.size, HASHED_AT_ONCE):
        digest.update(_as_float32(patterns[start : start + HASHED_AT_ONCE], tensor.dtype).data)
    return digest.hexdigest()


def _as_float32(patterns: NDArray[np.unsignedinteger], dtype: torch.dtype) -> NDArray[np.float32]:
    if dtype == torch.bfloat16:  # the upper half of a float32
        return (patterns.astype(np.uint32) << 16).view(np.float32)
    return patterns.view(np.float16 if dtype == torch.float16 else np.float32).astype(np.float32, copy=False)
