"""Fake GPUs: their tensors report ``cuda:0``, or another device, and are stored on the host.

They show where tensors are without a GPU. An operation on tensors of different devices raises, as on real ones, and
every operation that would make the host wait for the GPU is recorded in ``Gpu.waits``. They have neither kernels nor
memory of their own, and cannot be compiled for. They exist on every thread, each of which has a current one.
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

from tests.fake_cuda import Gpus, checked, current_device, fake_cuda

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)
COMPILER = shutil.which("c++") or shutil.which("g++")
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
static c10::impl::DeviceGuardImplRegistrar registrar(
    c10::DeviceType::CUDA, new c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>());
"""
"""PyTorch without CUDA has no guard to switch between such devices. With CUDA it must not be registered again."""
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default}
"""Operations whose results depend on values, so that the host waits for them."""
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
COPIES = {aten.copy_.default, aten._to_copy.default}


class Gpu:
    """The waits for all fake GPUs."""

    waits: ClassVar[list[str]] = []
    """The code in the project or a library that waited for the GPU, or copied from or to it."""

    @classmethod
    def wait(cls, why: str) -> None:
        """Record the caller of a wait."""
        frames = [f for f in traceback.extract_stack() if Path(f.filename).name != Path(__file__).name]
        frames = [f for f in frames if "/torch/" not in f.filename and not f.filename.endswith("fake_cuda.py")]
        cls.waits.append(f"{why} in {Path(frames[-1].filename).name}, {frames[-1].name}")


class FakeGpuTensor(torch.Tensor):
    """A tensor on a fake GPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls: type["FakeGpuTensor"], held: torch.Tensor, device: torch.device) -> "FakeGpuTensor":
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
        return f"FakeGpuTensor({self.held}, {self.device})"

    def tolist(self) -> Any:
        """Not supported by PyTorch's wrapper subclasses."""
        Gpu.wait("tolist")
        return self.held.tolist()

    def numpy(self, *_args: Any, **_more: Any) -> Any:
        """Raise PyTorch's error."""
        raise TypeError(f"can't convert {self.device} device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # a class method in PyTorch's documentation, but not in its types
        cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation on fake tensors."""
        return run(func, args, kwargs or {})


class FakeGpuMode(TorchDispatchMode):
    """Within it, on its thread, tensors that are created on ``cuda`` are fake tensors."""

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run one operation on the host, with its results on the device where they belong."""
    if func.overloadpacket is aten.to:  # in inference mode it is not decomposed
        with FakeGpuMode():
            return func.decompose(*args, **kwargs)
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    has_gpu_tensor = any(isinstance(t, FakeGpuTensor) for t in tensors)
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
    inside, rest = tree_map(lambda t: t.held if isinstance(t, FakeGpuTensor) else t, (args, rest))
    result = func(*inside, **rest)
    if device is None:
        return args[0] if func is aten.copy_.default else result
    result = tree_map(lambda t: FakeGpuTensor(t, device) if isinstance(t, torch.Tensor) else t, result)
    return return_and_correct_aliasing(func, args, kwargs, result) if has_gpu_tensor else result


def device_of_result(func: Any, args: Any, kwargs: dict[str, Any], tensors: list[torch.Tensor]) -> torch.device | None:
    """The GPU of the result, if it is on one."""
    if func is aten.copy_.default:
        return args[0].device if isinstance(args[0], FakeGpuTensor) else None
    if kwargs.get("device") is None:
        return next((t.device for t in tensors if isinstance(t, FakeGpuTensor)), None)
    target = torch.device(kwargs["device"])
    if target.type != "cuda":
        return None
    return torch.device("cuda", checked(current_device() if target.index is None else target.index))


def check_copy(func: Any, args: Any, kwargs: dict[str, Any], *, goes_to_gpu: bool) -> None:
    """Record a copy between host and GPU that is waited for."""
    is_copy_into = func is aten.copy_.default
    is_awaited = not (args[2:3] == (True,) if is_copy_into else kwargs.get("non_blocking", False))
    if is_awaited and isinstance(args[1 if is_copy_into else 0], FakeGpuTensor) != goes_to_gpu:
        Gpu.wait("a copy to the GPU" if goes_to_gpu else "a copy from the GPU")


def check_operands(func: Any, args: Any, tensors: list[torch.Tensor]) -> None:
    """Raise if a GPU would refuse the operands, and record it if the host would wait for their values."""
    if func in READS:
        Gpu.wait(str(func))
    if func in INDEXING and isinstance(args[0], FakeGpuTensor):
        indices = [index for index in args[1] if index is not None]
        if any(not isinstance(index, FakeGpuTensor) or index.dtype == torch.bool for index in indices):
            Gpu.wait("an index of the host, or a mask")
        return
    devices = {t.device for t in tensors if isinstance(t, FakeGpuTensor) or t.dim() > 0}  # a scalar may be on the host
    if len(devices) > 1:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device")


@cache
def load_guard() -> None:
    """Compile the device guard that PyTorch lacks, and load it into this process permanently."""
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
def fake_gpus(count: int = 1) -> Iterator[None]:
    """Within the block there are ``count`` fake GPUs, for this thread and for threads that start in it."""
    load_guard()
    Gpu.waits = []
    only_lifts = torch._C._only_lift_cpu_tensors()
    run_thread = threading.Thread.run

    def run_with_fakes(thread: threading.Thread) -> None:
        with FakeGpuMode():
            run_thread(thread)

    with fake_cuda(count, Gpu.wait), pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "run", run_with_fakes)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        torch._C._set_only_lift_cpu_tensors(True)
        try:
            with FakeGpuMode():
                yield
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(False)
            torch._C._set_only_lift_cpu_tensors(only_lifts)
