"""Counts the peak memory of tensors on a device, operation by operation.

This includes the ``meta`` device, whose tensors have sizes but no memory, so models can be counted that do not fit on
the machine. Only results of operations are counted. Temporary memory of kernels must be declared by a function.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Workspace = Callable[[Any, tuple[Any, ...], Any], int]
"""Returns the temporary bytes of an operation, given the operation, its arguments and its result."""


def no_workspace(_operation: Any, _args: tuple[Any, ...], _result: Any) -> int:
    """Assume no temporary memory."""
    return 0


class PeakMemory(TorchDispatchMode):
    """Counts the storages of a device, each from the operation that returns it until it is freed.

    Args:
        device: device whose tensors are counted.
        workspace: returns the temporary bytes of operations.
    """

    def __init__(self, device: torch.device, workspace: Workspace = no_workspace) -> None:
        super().__init__()
        self._device = device
        self._workspace = workspace
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.num_bytes = 0
        """Bytes that are allocated now."""
        self._peak = 0

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count existing tensors."""
        for tensor in tensors:
            self._count(tensor)

    def take_peak(self) -> int:
        """Return the peak since the last call."""
        peak, self._peak = self._peak, self.num_bytes
        return peak

    def _count(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != self._device.type:
            return
        storage = tensor.untyped_storage()  # the same object while the memory is allocated
        key, num_bytes = id(storage), storage.nbytes()
        if key not in self._storages:
            self._storages[key] = weakref.ref(storage, lambda _: self._freed(key, num_bytes))
            self.num_bytes += num_bytes
            self._peak = max(self._peak, self.num_bytes)

    def _freed(self, key: int, num_bytes: int) -> None:
        del self._storages[key]
        self.num_bytes -= num_bytes

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count its results."""
        result = func(*args, **(kwargs or {}))
        self.add(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        self._peak = max(self._peak, self.num_bytes + self._workspace(func, args, result))
        return result
