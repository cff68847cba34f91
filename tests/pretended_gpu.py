"""A GPU that is pretended: its tensors say that they are on ``cuda:0``, and are held by the host.

What it shows without a GPU is where tensors are. An operation on tensors of the host and of the GPU raises, as on a
real one, and whatever would make the host wait until the GPU has nothing left to do is noted in ``Gpu.waits``. It has
neither kernels nor memory of its own, and it cannot be compiled for.
"""

import ctypes
import shutil
import subprocess
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

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
        frames = [f for f in frames if "/torch/" not in f.filename]
        cls.waits.append(f"{why} in {Path(frames[-1].filename).name}, {frames[-1].name}")


class OnGpu(torch.Tensor):
    """A tensor of the pretended GPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls: type["OnGpu"], held: torch.Tensor) -> "OnGpu":
        """As large, with the same strides."""
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGpu({self.held})"

    def tolist(self) -> Any:
        """Subclasses have none."""
        Gpu.wait("tolist")
        return self.held.tolist()

    def numpy(self, *_args: Any, **_more: Any) -> Any:
        """As PyTorch says it."""
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

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
    goes_to_gpu = is_for_gpu(func, args, kwargs, has_gpu_tensor=has_gpu_tensor)
    if func in COPIES:
        check_copy(func, args, kwargs, goes_to_gpu=goes_to_gpu)
    elif has_gpu_tensor:
        check_operands(func, args, tensors)
    rest = {name: value for name, value in kwargs.items() if name not in ("device", "non_blocking", "pin_memory")}
    if kwargs.get("device") is not None:
        rest["device"] = torch.device("cpu")
    inside, rest = tree_map(lambda t: t.held if isinstance(t, OnGpu) else t, (args, rest))
    result = func(*inside, **rest)
    if not goes_to_gpu:
        return args[0] if func is aten.copy_.default else result
    result = tree_map(lambda t: OnGpu(t) if isinstance(t, torch.Tensor) else t, result)
    return return_and_correct_aliasing(func, args, kwargs, result) if has_gpu_tensor else result


def is_for_gpu(func: Any, args: Any, kwargs: dict[str, Any], *, has_gpu_tensor: bool) -> bool:
    """Whether the result is on the GPU."""
    if func is aten.copy_.default:
        return isinstance(args[0], OnGpu)
    target = kwargs.get("device")
    return has_gpu_tensor if target is None else torch.device(target).type == "cuda"


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
    if any(not isinstance(tensor, OnGpu) and tensor.dim() > 0 for tensor in tensors):  # a number may be of the host
        raise RuntimeError(f"{func}: expected all tensors to be on the same device")


class Event:
    """Of ``torch.cuda``: nothing is left to do when it is waited for."""

    def __init__(self, **_: object) -> None:
        pass

    def record(self, _stream: object) -> None:
        """At once."""

    def synchronize(self) -> None:
        """At once; the GPU has later work meanwhile, so this is none of ``Gpu.waits``."""


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
def pretended() -> Iterator[None]:
    """Within the block there is one, for this thread."""
    load_guard()
    Gpu.waits = []
    only_lifts = torch._C._only_lift_cpu_tensors()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(
            torch.cuda, "current_stream", lambda _: SimpleNamespace(synchronize=lambda: Gpu.wait("the stream"))
        )
        patch.setattr(torch.cuda, "set_device", lambda _: None)
        patch.setattr(torch.cuda, "synchronize", lambda _=None: Gpu.wait("synchronize"))
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        torch._C._set_only_lift_cpu_tensors(True)
        try:
            with Pretending():
                yield
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(False)
            torch._C._set_only_lift_cpu_tensors(only_lifts)
