"""Retries after out-of-memory errors, and the memory that is free by then."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from flux2_shared.device.memory import run_within_memory
from flux2_shared.errors import OutOfMemory

REFUSAL = "an image of 64x64 does not fit"


class Attempts:
    """Calls that fail ``num_failures`` times, each with a tensor in a frame that the error's traceback references."""

    def __init__(self, num_failures: int, error: Callable[[], Exception]) -> None:
        self.num_failures = num_failures
        self.error = error
        self.tensors: list[weakref.ref[torch.Tensor]] = []
        self.num_alive_when_emptied: list[int] = []

    def __call__(self) -> int:
        """Return the number of attempts."""
        with in_a_context():
            self._allocate()
        return len(self.tensors)

    def _allocate(self) -> None:
        tensor = torch.ones(4)
        self.tensors.append(weakref.ref(tensor))
        if len(self.tensors) > self.num_failures:
            return
        try:
            raise self.error()
        except Exception as error:
            kept = error  # noqa: F841 - a reference cycle of the frame, the error and its traceback
            raise

    def emptied(self) -> None:
        """The replacement of ``torch.cuda.empty_cache``."""
        self.num_alive_when_emptied.append(sum(tensor() is not None for tensor in self.tensors))


@contextmanager
def in_a_context() -> Iterator[None]:
    """Call within several context managers, as generations do."""
    yield


def attempts(
    monkeypatch: pytest.MonkeyPatch, num_failures: int, error: Callable[[], Exception] = torch.OutOfMemoryError
) -> Attempts:
    """Attempts whose cache operations are recorded."""
    recorded = Attempts(num_failures, error)
    monkeypatch.setattr(torch.cuda, "empty_cache", recorded.emptied)
    return recorded


def test_memory_is_free_before_the_second_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the allocator's cache is emptied, no tensor of the failed attempt is alive."""
    run = attempts(monkeypatch, 1)
    assert run_within_memory(run, REFUSAL, num_attempts=2) == 2
    assert run.num_alive_when_emptied == [0]


@pytest.mark.parametrize("num_attempts", [1, 2, 3])
def test_a_call_that_never_fits_is_refused(monkeypatch: pytest.MonkeyPatch, num_attempts: int) -> None:
    """After all attempts it is ``OutOfMemory`` without references to them."""
    run = attempts(monkeypatch, 10, lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `c`"))
    with pytest.raises(OutOfMemory, match=REFUSAL) as caught:
        run_within_memory(run, REFUSAL, num_attempts=num_attempts)
    assert run.num_alive_when_emptied == [0] * num_attempts
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    "error", [ValueError("shapes"), torch.AcceleratorError("CUDA error: an illegal memory access was encountered")]
)
def test_other_errors_are_not_retried(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Programming errors, and a lost device, reach the caller unchanged and at once."""
    run = attempts(monkeypatch, 1, lambda: error)
    with pytest.raises(type(error)) as caught:
        run_within_memory(run, REFUSAL, num_attempts=2)
    assert caught.value is error
    assert len(run.tensors) == 1


def test_a_lost_device_is_not_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    """An out-of-memory error caused by a sticky error is not retried, and stays a sticky error."""

    def lost() -> Exception:
        error = torch.OutOfMemoryError("CUDA out of memory.")
        error.__context__ = torch.AcceleratorError("CUDA error: device-side assert triggered")
        return error

    run = attempts(monkeypatch, 1, lost)
    with pytest.raises(torch.OutOfMemoryError):
        run_within_memory(run, REFUSAL, num_attempts=2)
    assert len(run.tensors) == 1
