"""The trace of the denoising loop."""

from collections import Counter

import pytest
import torch
from torch.profiler import record_function

from benchmarks.architectures import TINY
from benchmarks.generator.engine import GUIDANCE
from benchmarks.generator.synthetic import Source
from benchmarks.generator.trace import MARK, Event, alternating, kernels_of, record_events, step_starts, waits_by_step
from generator_service.pipelines.params import Params

EVENTS = [
    Event("cudaStreamSynchronize", 5, 6, is_on_device=False),  # before the loop
    Event("flux2 step 0", 10, 11, is_on_device=False),
    Event("flux2 step 0", 30, 31, is_on_device=True),  # its mark on the device
    Event("gemm", 12, 14, is_on_device=True),
    Event("cudaStreamSynchronize", 15, 16, is_on_device=False),
    Event("flux2 step 1", 20, 21, is_on_device=False),
    Event("gemm", 22, 25, is_on_device=True),
    Event("gemm", 26, 27, is_on_device=True),
    Event("norm", 27, 28, is_on_device=True),
    Event("Memcpy DtoH (Device -> Pageable)", 28, 29, is_on_device=True),
    Event("flux2 step 2", 40, 41, is_on_device=False),
    Event(
        "cudaDeviceSynchronize", 45, 46, is_on_device=False
    ),  # after the last step began: the image is copied to the host
]


def test_waits_are_counted_only_inside_the_loop() -> None:
    """Waits and copies count from the first step's beginning to the last's, by step."""
    assert waits_by_step(EVENTS) == {0: Counter({"cudaStreamSynchronize": 1}), 1: Counter({"Memcpy DtoH": 1})}


def test_kernels_belong_to_the_step_in_which_they_started() -> None:
    """A step's kernels are those that started in it, the longest first; marks are excluded."""
    kernels = kernels_of(EVENTS, 1, is_computed=True, on_device=True)
    assert kernels.wall_ms == pytest.approx(0.02)
    assert kernels.busy_ms == pytest.approx(0.006)
    assert kernels.num_kernels == 4
    name, count, milliseconds = kernels.top[0]
    assert (name, count) == ("gemm", 2)
    assert milliseconds == pytest.approx(0.004)


@pytest.mark.filterwarnings("default")
def test_foreign_marks_are_ignored() -> None:
    """Marks of compiled code or of a library are not counted beside the events inside them; only our marks are kept."""
    source = Source(TINY, device="cpu")

    def mark() -> None:
        with record_function("somebody's"):
            torch.ones(1)

    with source.model("exact") as model:
        request = Params(source.embedding(), 64, 64, GUIDANCE, 0, alternating(4))
        events = record_events(model, request, mark)
    assert len(step_starts(events)) == 4
    assert not any("somebody" in event.name for event in events)
    assert {event.name for event in events if event.name.startswith(MARK)} == {f"{MARK}{step}" for step in range(4)}
    assert any(event.name == "aten::ones" for event in events)
