"""What may not fit, and what is left of it."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from flux2_shared.device.memory import run_within_memory
from flux2_shared.errors import OutOfMemory

REFUSAL = "a picture of 64x64 does not fit"


class Attempts:
    """Runs that fail ``num_failures`` times, each with a tensor in a frame that the error's traceback holds."""

    def __init__(self, num_failures: int, error: Callable[[], Exception]) -> None:
        self.num_failures = num_failures
        self.error = error
        self.tensors: list[weakref.ref[torch.Tensor]] = []
        self.num_alive_when_emptied: list[int] = []

    def __call__(self) -> int:
        """The number of attempts."""
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
            kept = error  # noqa: F841 - a cycle: the frame holds the error, whose traceback holds the frame
            raise

    def emptied(self) -> None:
        """In place of ``torch.cuda.empty_cache``."""
        self.num_alive_when_emptied.append(sum(tensor() is not None for tensor in self.tensors))


@contextmanager
def in_a_context() -> Iterator[None]:
    """As generations run within several."""
    yield


def attempts(
    monkeypatch: pytest.MonkeyPatch, num_failures: int, error: Callable[[], Exception] = torch.OutOfMemoryError
) -> Attempts:
    """Runs whose caches are watched."""
    made = Attempts(num_failures, error)
    monkeypatch.setattr(torch.cuda, "empty_cache", made.emptied)
    return made


def test_a_second_attempt_finds_the_memory_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the allocator's cache is emptied, nothing holds a tensor of the attempt that failed."""
    run = attempts(monkeypatch, 1)
    assert run_within_memory(run, REFUSAL, num_attempts=2) == 2
    assert run.num_alive_when_emptied == [0]


@pytest.mark.parametrize("num_attempts", [1, 2, 3])
def test_what_never_fits_is_refused(monkeypatch: pytest.MonkeyPatch, num_attempts: int) -> None:
    """After so many attempts it is ``OutOfMemory``, which holds nothing of them."""
    run = attempts(monkeypatch, 10, lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `c`"))
    with pytest.raises(OutOfMemory, match=REFUSAL) as caught:
        run_within_memory(run, REFUSAL, num_attempts=num_attempts)
    assert run.num_alive_when_emptied == [0] * num_attempts
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    "error", [ValueError("shapes"), torch.AcceleratorError("CUDA error: an illegal memory access was encountered")]
)
def test_other_errors_are_not_tried_again(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Mistakes, and a device that is lost, reach the caller as they are, at once."""
    run = attempts(monkeypatch, 1, lambda: error)
    with pytest.raises(type(error)) as caught:
        run_within_memory(run, REFUSAL, num_attempts=2)
    assert caught.value is error
    assert len(run.tensors) == 1


def test_a_device_that_is_lost_has_no_memory_to_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little memory on the way from a sticky error is not tried again, and stays what it is."""

    def lost() -> Exception:
        error = torch.OutOfMemoryError("CUDA out of memory.")
        error.__context__ = torch.AcceleratorError("CUDA error: device-side assert triggered")
        return error

    run = attempts(monkeypatch, 1, lost)
    with pytest.raises(torch.OutOfMemoryError):
        run_within_memory(run, REFUSAL, num_attempts=2)
    assert len(run.tensors) == 1
