"""How much memory tensors take on a device at most, counted operation by operation.

Also on the ``meta`` device, whose tensors have a size and no memory: so a model that fits no machine can be counted by
running its own code. What is seen is what operations return; what a kernel takes and gives back inside of itself is
not, but for a function that says it.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Workspace = Callable[[Any, tuple[Any, ...], Any], int]
"""An operation, its arguments and its result to the bytes that it takes meanwhile, beside its result."""


def no_workspace(_operation: Any, _args: tuple[Any, ...], _result: Any) -> int:
    """None is known of."""
    return 0


class PeakMemory(TorchDispatchMode):
    """Within it the storages of one device are counted, each from the operation that returns it until it is freed.

    Args:
        device: the one whose tensors are counted.
        workspace: what operations take beside what they return.
    """

    def __init__(self, device: torch.device, workspace: Workspace = no_workspace) -> None:
        super().__init__()
        self._device = device
        self._workspace = workspace
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.num_bytes = 0
        """Alive now."""
        self._peak = 0

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors that were there before."""
        for tensor in tensors:
            self._count(tensor)

    def take_peak(self) -> int:
        """The most bytes that were alive since this was last asked."""
        peak, self._peak = self._peak, self.num_bytes
        return peak

    def _count(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != self._device.type:
            return
        storage = tensor.untyped_storage()  # the same object for as long as the memory is held
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
        """Run an operation, and count what it returns."""
        result = func(*args, **(kwargs or {}))
        self.add(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        self._peak = max(self._peak, self.num_bytes + self._workspace(func, args, result))
        return result
