"""Tensors read and copied without torch operations: equal results, and no thread pool."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux2_shared.model.cpu_tensors import (
    EXPONENT_BITS,
    HASH_CHUNK,
    UNSIGNED,
    bit_patterns,
    compact,
    concatenate,
    float32_sha256,
    is_finite,
)

ROOT = Path(__file__).parents[2]
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
DTYPES = tuple(EXPONENT_BITS)

THREADS = """
import io, json, os, threading
import torch
from flux2_shared import wire
from flux2_shared.model import cpu_tensors

SHAPE = (1, 512, 15360)
rows = [torch.randn(SHAPE).to(torch.bfloat16) for _ in range(2)]
view = torch.stack(rows)[1]
saved, safetensors = wire.dump_torch(rows[0]), wire.dump_safetensors(rows[0])
operations = {
    "torch": lambda: torch.isfinite(rows[0]).all(),
    "is_finite": lambda: cpu_tensors.is_finite(rows[0]),
    "concatenate": lambda: cpu_tensors.concatenate(rows),
    "float32_sha256": lambda: cpu_tensors.float32_sha256(rows[0]),
    "dump_torch": lambda: wire.dump_torch(rows[0]),
    "dump_torch of a view": lambda: wire.dump_torch(view),
    "dump_safetensors": lambda: wire.dump_safetensors(rows[0]),
    "dump_safetensors of a view": lambda: wire.dump_safetensors(view),
    "parse_torch": lambda: wire.parse_torch(saved, SHAPE),
    "parse_safetensors": lambda: wire.parse_safetensors(safetensors, SHAPE),
}
started = {}

def count(name):
    before = set(os.listdir("/proc/self/task"))
    operations[name]()
    started[name] = len(set(os.listdir("/proc/self/task")) - before)

for name in operations:
    thread = threading.Thread(target=count, args=[name])
    thread.start()
    thread.join()
print(json.dumps(started))
"""
"""Runs each operation at FLUX.2 [dev]'s full size on a new thread, and counts the threads it starts."""


def of_patterns(patterns: list[int], dtype: torch.dtype) -> torch.Tensor:
    """The tensor whose elements have these bit patterns."""
    return torch.from_numpy(np.array(patterns, dtype=UNSIGNED[dtype.itemsize])).view(dtype)


def random_tensor(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Reproducible random values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_every_16_bit_pattern_is_classified_as_torch_does(dtype: torch.dtype) -> None:
    """Each of the 65,536 patterns, alone in a tensor, is classified as torch classifies it."""
    every = of_patterns(list(range(2**16)), dtype)
    ours = [is_finite(element) for element in every.split(1)]
    assert ours == torch.isfinite(every).tolist()


def edge_patterns(dtype: torch.dtype) -> list[int]:
    """Zero, denormals, the largest number, infinity and NaNs, of both signs."""
    exponent, sign = EXPONENT_BITS[dtype], 1 << (8 * dtype.itemsize - 1)
    positive = [0, 1, exponent - 1, exponent, exponent + 1, sign - 1]
    return positive + [sign | pattern for pattern in positive]


@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None)
@given(data=st.data())
def test_is_finite_agrees_with_torch(dtype: torch.dtype, data: st.DataObject) -> None:
    """For any bit patterns in any order the result equals ``torch.isfinite(x).all()``."""
    edges = st.sampled_from(edge_patterns(dtype))
    pattern = st.integers(0, 2 ** (8 * dtype.itemsize) - 1) | edges
    tensor = of_patterns(data.draw(st.lists(pattern, min_size=1, max_size=80)), dtype)
    assert is_finite(tensor) == bool(torch.isfinite(tensor).all())


@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None)
@given(size=st.integers(1, 5000), data=st.data())
def test_one_value_that_is_not_finite_is_detected_at_any_position(
    dtype: torch.dtype, size: int, data: st.DataObject
) -> None:
    """One infinity or NaN among finite numbers of both signs is detected, wherever it is."""
    tensor = random_tensor(size, dtype=dtype)
    assert is_finite(tensor)
    tensor[data.draw(st.integers(0, size - 1))] = data.draw(st.sampled_from([float("inf"), float("-inf"), torch.nan]))
    assert not is_finite(tensor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_concatenate_is_torch_cat(dtype: torch.dtype, count: int) -> None:
    """Rows are joined bit for bit, and the result fills its storage."""
    rows = list(random_tensor(count, 3, 7, dtype=dtype).split(1))
    joined = concatenate([row.clone() for row in rows])
    assert joined.dtype == dtype
    assert torch.equal(joined, torch.cat(rows))
    assert joined.untyped_storage().nbytes() == joined.nbytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_compact_copies_only_noncompact_tensors(dtype: torch.dtype) -> None:
    """A view of a larger storage and a transposed tensor are copied in order; others are returned unchanged."""
    whole = random_tensor(4, 3, 5, dtype=dtype)
    assert compact(whole) is whole
    for view in (whole[1:2], whole.transpose(1, 2), whole[..., ::2]):
        copy = compact(view)
        assert torch.equal(copy, view)
        assert copy.is_contiguous()
        assert copy.untyped_storage().nbytes() == copy.nbytes


def test_tensors_of_inference_mode_are_supported() -> None:
    """A result of ``torch.inference_mode`` can be read on another thread, outside of that mode."""
    with torch.inference_mode():
        row = random_tensor(2, 4, 6, dtype=torch.bfloat16)[1:]
    assert is_finite(row)
    assert torch.equal(compact(row), row)
    assert np.array_equal(bit_patterns(row), row.view(torch.int16).numpy().view(np.uint16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, HASH_CHUNK - 1, HASH_CHUNK, 2 * HASH_CHUNK + 1])
def test_the_digest_is_that_of_the_float32_values(dtype: torch.dtype, size: int) -> None:
    """It does not depend on the layout of the elements, and equals the digest of torch's conversion."""
    tensor = random_tensor(1, size, dtype=dtype)
    assert float32_sha256(tensor) == hashlib.sha256(tensor.float().numpy().tobytes()).hexdigest()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux lists a process's threads")
def test_no_operation_starts_a_thread_pool() -> None:
    """On a new thread torch starts a pool for a tensor of full size, and none of these functions do."""
    environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", THREADS], env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    started = json.loads(result.stdout)
    assert started.pop("torch") == 1
    assert set(started.values()) == {0}, started
