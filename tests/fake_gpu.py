"""GPUs that are pretended: their tensors say that they are on ``cuda:0``, or another, and are held by the host.

What they show without a GPU is where tensors are. An operation on tensors of different devices raises, as on real
ones, and whatever would make the host wait until the GPU has nothing left to do is noted in ``Gpu.waits``. They have
neither kernels nor memory of their own, and cannot be compiled for. Every thread has them, and a current one.
"""

import ctypes
import shutil
import subprocess
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

from tests.pretended_cuda import Gpus, checked, current_device, pretended_cuda

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)
COMPILER = shutil.which("c++") or shutil.which("g++")
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
static c10::impl::DeviceGuardImplRegistrar registrar(
    c10::DeviceType::CUDA, new c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>());
"""
"""PyTorch without CUDA does not even know how to switch to such a device. With CUDA it must not be told."""
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default}
"""What these give depends on values: the host waits for them."""
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
COPIES = {aten.copy_.default, aten._to_copy.default}


class Gpu:
    """What is known of the one that is pretended."""

    waits: ClassVar[list[str]] = []
    """Where in the project or a library the host waited for it, or copied from or to it."""

    @classmethod
    def wait(cls, why: str) -> None:
        """Note who waits."""
        frames = [f for f in traceback.extract_stack() if Path(f.filename).name != Path(__file__).name]
        frames = [f for f in frames if "/torch/" not in f.filename and not f.filename.endswith("pretended_cuda.py")]
        cls.waits.append(f"{why} in {Path(frames[-1].filename).name}, {frames[-1].name}")


class OnGpu(torch.Tensor):
    """A tensor of a pretended GPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls: type["OnGpu"], held: torch.Tensor, device: torch.device) -> "OnGpu":
        """As large, with the same strides."""
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device,
        )

    def __init__(self, held: torch.Tensor, _device: torch.device) -> None:
        self.held = held
        Gpus.tensors[id(self)] = self
        Gpus.touched.add(self.device.index)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGpu({self.held}, {self.device})"

    def tolist(self) -> Any:
        """Subclasses have none."""
        Gpu.wait("tolist")
        return self.held.tolist()

    def numpy(self, *_args: Any, **_more: Any) -> Any:
        """As PyTorch says it."""
        raise TypeError(f"can't convert {self.device} device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # PyTorch's documentation has a class method, its types have not
        cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Every operation on one."""
        return run(func, args, kwargs or {})


class Pretending(TorchDispatchMode):
    """Within it, on its thread, what is made on ``cuda`` is made on the pretended GPU."""

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every operation."""
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation, on the host, as if on the device where it belongs."""
    if func.overloadpacket is aten.to:  # in inference mode it comes undivided
        with Pretending():
            return func.decompose(*args, **kwargs)
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    has_gpu_tensor = any(isinstance(t, OnGpu) for t in tensors)
    device = device_of_result(func, args, kwargs, tensors)
    if func in COPIES:
        check_copy(func, args, kwargs, goes_to_gpu=device is not None)
    elif has_gpu_tensor:
        check_operands(func, args, tensors)
    if kwargs.get("pin_memory"):
        Gpus.touched.add(current_device())
    rest = {name: value for name, value in kwargs.items() if name not in ("device", "non_blocking", "pin_memory")}
    if kwargs.get("device") is not None:
        rest["device"] = torch.device("cpu")
    inside, rest = tree_map(lambda t: t.held if isinstance(t, OnGpu) else t, (args, rest))
    result = func(*inside, **rest)
    if device is None:
        return args[0] if func is aten.copy_.default else result
    result = tree_map(lambda t: OnGpu(t, device) if isinstance(t, torch.Tensor) else t, result)
    return return_and_correct_aliasing(func, args, kwargs, result) if has_gpu_tensor else result


def device_of_result(func: Any, args: Any, kwargs: dict[str, Any], tensors: list[torch.Tensor]) -> torch.device | None:
    """The GPU that the result is on, if it is on one."""
    if func is aten.copy_.default:
        return args[0].device if isinstance(args[0], OnGpu) else None
    if kwargs.get("device") is None:
        return next((t.device for t in tensors if isinstance(t, OnGpu)), None)
    target = torch.device(kwargs["device"])
    if target.type != "cuda":
        return None
    return torch.device("cuda", checked(current_device() if target.index is None else target.index))


def check_copy(func: Any, args: Any, kwargs: dict[str, Any], *, goes_to_gpu: bool) -> None:
    """Note one between the host and the GPU that is waited for."""
    is_copy_into = func is aten.copy_.default
    is_awaited = not (args[2:3] == (True,) if is_copy_into else kwargs.get("non_blocking", False))
    if is_awaited and isinstance(args[1 if is_copy_into else 0], OnGpu) != goes_to_gpu:
        Gpu.wait("a copy to the GPU" if goes_to_gpu else "a copy from the GPU")


def check_operands(func: Any, args: Any, tensors: list[torch.Tensor]) -> None:
    """Raise if a GPU would refuse them, and note it if the host would wait for their values."""
    if func in READS:
        Gpu.wait(str(func))
    if func in INDEXING and isinstance(args[0], OnGpu):
        indices = [index for index in args[1] if index is not None]
        if any(not isinstance(index, OnGpu) or index.dtype == torch.bool for index in indices):
            Gpu.wait("an index of the host, or a mask")
        return
    devices = {t.device for t in tensors if isinstance(t, OnGpu) or t.dim() > 0}  # a number may be of the host
    if len(devices) > 1:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device")


@cache
def load_guard() -> None:
    """Compile what PyTorch lacks, and load it into this process, which keeps it."""
    assert COMPILER is not None
    assert torch.version.cuda is None
    installed = Path(torch.__file__).parent
    with TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(GUARD)
        flags = ["-std=c++17", "-shared", "-fPIC", f"-I{installed / 'include'}", f"-L{installed / 'lib'}", "-lc10"]
        subprocess.run([COMPILER, str(source), *flags, "-o", str(library)], check=True)
        ctypes.CDLL(str(library))


@contextmanager
def pretended(count: int = 1) -> Iterator[None]:
    """Within the block there are ``count`` of them, for this thread and for those that start meanwhile."""
    load_guard()
    Gpu.waits = []
    only_lifts = torch._C._only_lift_cpu_tensors()
    run_thread = threading.Thread.run

    def run_pretending(thread: threading.Thread) -> None:
        with Pretending():
            run_thread(thread)

    with pretended_cuda(count, Gpu.wait), pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "run", run_pretending)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        torch._C._set_only_lift_cpu_tensors(True)
        try:
            with Pretending():
                yield
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(False)
            torch._C._set_only_lift_cpu_tensors(only_lifts)
