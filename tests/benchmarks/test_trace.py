"""What happens inside the denoising loop."""

from collections import Counter

import pytest

from benchmarks.trace import Event, kernels_of, waits_by_step

EVENTS = [
    Event("cudaStreamSynchronize", 5, 6, is_on_device=False),  # before the loop
    Event("flux2 step 0", 10, 11, is_on_device=False),
    Event("flux2 step 0", 30, 31, is_on_device=True),  # its shadow on the device
    Event("gemm", 12, 14, is_on_device=True),
    Event("cudaStreamSynchronize", 15, 16, is_on_device=False),
    Event("flux2 step 1", 20, 21, is_on_device=False),
    Event("gemm", 22, 25, is_on_device=True),
    Event("gemm", 26, 27, is_on_device=True),
    Event("norm", 27, 28, is_on_device=True),
    Event("Memcpy DtoH (Device -> Pageable)", 28, 29, is_on_device=True),
    Event("flux2 step 2", 40, 41, is_on_device=False),
    Event("cudaDeviceSynchronize", 45, 46, is_on_device=False),  # after the last step began: the picture is fetched
]


def test_waits_are_counted_inside_the_loop_alone() -> None:
    """Waits and copies count from the first step's beginning to the last's, by step."""
    assert waits_by_step(EVENTS) == {0: Counter({"cudaStreamSynchronize": 1}), 1: Counter({"Memcpy DtoH": 1})}


def test_kernels_belong_to_the_step_in_which_they_ran() -> None:
    """A step's kernels are those that began in it, the longest first; marks are none."""
    found = kernels_of(EVENTS, 1, is_computed=True, on_device=True)
    assert found.wall_ms == pytest.approx(0.02)
    assert found.busy_ms == pytest.approx(0.006)
    assert found.num_kernels == 4
    assert found.top[0] == ("gemm", 2, pytest.approx(0.004))
