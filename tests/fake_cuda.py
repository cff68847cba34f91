"""A replacement of ``torch.cuda`` for fake GPUs: their number, current device, streams, events and memory.

Each function checks its arguments as PyTorch does, with PyTorch's own code where it has some, and then that the device
exists. A function that is not replaced fails as it does without CUDA.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch.cuda._utils import _get_device_index
from transformers.utils import import_utils

CAPABILITY = (9, 0)
MEMORY_BYTES = 80 * 2**30


class Gpus:
    """The state of all fake GPUs."""

    count: ClassVar[int] = 1
    current: ClassVar[threading.local] = threading.local()
    """The current device of each thread, in ``index``: 0 unless it was set."""
    tensors: ClassVar[weakref.WeakValueDictionary[int, Any]] = weakref.WeakValueDictionary()
    """Every tensor on a fake GPU, by its ``id``."""
    touched: ClassVar[set[int]] = set()
    """Devices that had a tensor or a context; pinning host memory creates a context on the current device."""
    waits: ClassVar[Callable[[str], None]] = staticmethod(lambda _why: None)
    """Called when the host waits."""


class Stream:
    """The only stream of a device. PyTorch's own class cannot be created without CUDA."""

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)

    def synchronize(self) -> None:
        Gpus.waits("the stream")


class Event:
    """An event that is always complete."""

    def __init__(
        self,
        enable_timing: bool = False,
        blocking: bool = False,
        interprocess: bool = False,
        external: bool = False,
    ) -> None:
        del enable_timing, blocking, interprocess, external
        self._device: torch.device | None = None

    def record(self, stream: Stream | None = None) -> None:
        """Record at once; an event stays bound to the device that recorded it first."""
        stream = current_stream() if stream is None else stream
        if not isinstance(stream, Stream):
            raise TypeError(f"record() takes a stream, not {stream!r}")
        if self._device not in (None, stream.device):
            raise RuntimeError(f"Event device {self._device} does not match recording stream's device {stream.device}")
        self._device = stream.device

    def synchronize(self) -> None:
        """Return at once. The GPU has later work queued, so this does not count as a wait."""


def checked(index: int) -> int:
    """``index``, if the GPU exists."""
    if not 0 <= index < Gpus.count:
        raise RuntimeError(f"CUDA error: invalid device ordinal ({index} of {Gpus.count})")
    return index


def index_of(device: Any = None) -> int:
    """The index of a device; without an index it is the thread's current device."""
    return checked(_get_device_index(device, optional=True))


def current_device() -> int:
    """The calling thread's device."""
    return getattr(Gpus.current, "index", 0)


def set_device(device: Any) -> None:
    """As in PyTorch a device without an index is refused, and a negative number does nothing."""
    index = _get_device_index(device)
    if index >= 0:
        Gpus.current.index = checked(index)


def exchange_device(index: int) -> int:
    """Set the current device and return the previous one, for ``torch.cuda.device``."""
    before = current_device()
    set_device(index)
    return before


def current_stream(device: Any = None) -> Stream:
    return Stream(index_of(device))


def synchronize(device: Any = None) -> None:
    """Wait until ``device`` is idle."""
    index_of(device)
    Gpus.waits("synchronize")


def memory_allocated(device: Any = None) -> int:
    """The bytes of all tensors on ``device``; shared memory counts once."""
    index = index_of(device)
    tensors = [tensor for ref in Gpus.tensors.valuerefs() if (tensor := ref()) is not None]
    held = [tensor.held.untyped_storage() for tensor in tensors if tensor.device.index == index]
    return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())


def mem_get_info(device: Any = None) -> tuple[int, int]:
    return MEMORY_BYTES - memory_allocated(device), MEMORY_BYTES


def get_device_properties(device: Any = None) -> SimpleNamespace:
    """Properties of a Hopper GPU."""
    index, (major, minor) = index_of(device), CAPABILITY
    uuid = f"fake-{index}"
    return SimpleNamespace(name="fake", major=major, minor=minor, total_memory=MEMORY_BYTES, uuid=uuid)


REPLACED: dict[str, Any] = {
    "_exchange_device": exchange_device,
    "_lazy_init": lambda: None,
    "_maybe_exchange_device": exchange_device,
    "current_device": current_device,
    "current_stream": current_stream,
    "device_count": lambda: Gpus.count,
    "Event": Event,
    "get_device_properties": get_device_properties,
    "is_available": lambda: True,
    "mem_get_info": mem_get_info,
    "memory_allocated": memory_allocated,
    "memory_reserved": memory_allocated,
    "set_device": set_device,
    "synchronize": synchronize,
}


@contextmanager
def fake_cuda(count: int, waits: Callable[[str], None]) -> Iterator[None]:
    """Within the block ``torch.cuda`` has ``count`` GPUs; ``waits`` is called whenever the host waits."""
    import_utils.is_torch_cuda_available()  # its result is cached, and must not be that of the fake
    state = {"count": count, "current": threading.local(), "waits": waits}
    state |= {"tensors": weakref.WeakValueDictionary(), "touched": set()}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in state.items():
            patch.setattr(Gpus, name, value)
        for name, replacement in REPLACED.items():
            patch.setattr(torch.cuda, name, replacement)
        yield
