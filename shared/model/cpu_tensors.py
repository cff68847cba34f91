"""Operations on CPU tensors with numpy, for threads other than the device thread.

Above 32 768 elements torch's own operations (``isfinite``, ``clone``, ``cat``, ``to``) start an OpenMP thread pool for
the calling thread. While that thread lives, its pool competes with the device thread's pool for the same cores. numpy
runs on the calling thread only, and releases the GIL.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

EXPONENT_BITS = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000}
"""Exponent bits, which are all set in infinities and NaNs only. The keys are the supported dtypes."""
SIGNED = {2: np.int16, 4: np.int32}
UNSIGNED = {2: np.uint16, 4: np.uint32}
HASH_CHUNK = 2**17
"""Elements converted to float32 at a time, so that the copy stays in the CPU's cache."""


def bit_patterns(tensor: torch.Tensor) -> NDArray[np.unsignedinteger]:
    """View the tensor's elements as unsigned integers of the same shape; numpy has no bfloat16."""
    integers = {2: torch.int16, 4: torch.int32}[tensor.itemsize]
    patterns: NDArray[np.unsignedinteger] = tensor.detach().view(integers).numpy().view(UNSIGNED[tensor.itemsize])
    return patterns


def is_finite(tensor: torch.Tensor) -> bool:
    """Return the same as ``torch.isfinite(tensor).all()``, for at least one element.

    Without the sign bit, bit patterns are ordered by magnitude, with infinities and NaNs last. The maximum as signed
    integers finds the largest positive value, and the maximum as unsigned integers the largest negative one, if there
    is any. Two maxima are therefore sufficient, without a temporary array.
    """
    patterns, exponent = bit_patterns(tensor), EXPONENT_BITS[tensor.dtype]
    sign = 1 << (8 * tensor.itemsize - 1)
    return int(patterns.view(SIGNED[tensor.itemsize]).max()) < exponent and int(patterns.max()) < sign | exponent


def concatenate(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate tensors of one dtype along the first dimension, like ``torch.cat``; a single one is not copied."""
    if len(tensors) == 1:
        return tensors[0]
    joined = np.concatenate([bit_patterns(tensor) for tensor in tensors])
    return torch.from_numpy(joined).view(tensors[0].dtype)


def compact(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous tensor whose storage holds nothing else; no copy if it already is one."""
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return torch.from_numpy(bit_patterns(tensor).copy(order="C")).view(tensor.dtype)


def float32_sha256(tensor: torch.Tensor) -> str:
    """Return the hex SHA-256 of the elements as float32; equal for equal values in any supported dtype."""
    digest = hashlib.sha256()
    patterns = bit_patterns(tensor).reshape(-1)
    for start in range(0, patterns.size, HASH_CHUNK):
        digest.update(_as_float32(patterns[start : start + HASH_CHUNK], tensor.dtype).data)
    return digest.hexdigest()


def _as_float32(patterns: NDArray[np.unsignedinteger], dtype: torch.dtype) -> NDArray[np.float32]:
    if dtype == torch.bfloat16:  # the upper half of a float32
        return (patterns.astype(np.uint32) << 16).view(np.float32)
    return patterns.view(np.float16 if dtype == torch.float16 else np.float32).astype(np.float32, copy=False)
