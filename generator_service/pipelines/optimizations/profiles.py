"""Profiles: named sets of optimizations, each of which can be disabled.

``exact`` changes nothing: images equal diffusers' bit for bit. ``fast`` changes only the order of computations, so
images differ by rounding. ``fastest`` computes the blocks' linear layers in 8-bit floating point. ``offload`` is for
GPUs with too little memory for the transformer.
"""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from generator_service.settings import Optimization, ProfileName

if TYPE_CHECKING:
    import torch

    from flux2_shared.model.compilation import CompilerBackend

PROFILES: dict[str, frozenset[Optimization]] = {
    "exact": frozenset(),
    "fast": frozenset({"attention", "compile", "fused_qkv", "vae"}),
    "fastest": frozenset({"attention", "compile", "fp8", "fused_qkv", "vae"}),
    "offload": frozenset({"offload"}),
}
WORKING_BYTES = 6 * 10**9
"""GPU memory for activations and decoding at 1024x1024 and for CUDA, in addition to the weights."""
FP8_CAPABILITY = (8, 9)
"""Ada Lovelace, the first GPUs with 8-bit floating point in tensor cores."""
AMPERE = (8, 0)
"""The first GPUs with bfloat16 in tensor cores, for which compilation is worthwhile."""


@dataclass(frozen=True)
class Machine:
    """Properties of a machine that determine which optimizations are possible."""

    device_type: str
    capability: tuple[int, int] = (0, 0)
    """Compute capability of a CUDA device."""
    has_torchao: bool = False
    memory_bytes: int = 0
    """Total memory of a CUDA device."""

    @classmethod
    def of(cls, device: "torch.device") -> "Machine":
        """Examine the machine of ``device``."""
        if device.type != "cuda":
            return cls(device.type)
        import torch  # noqa: PLC0415 - choosing a profile needs no torch

        properties = torch.cuda.get_device_properties(device)
        capability = (properties.major, properties.minor)
        return cls(device.type, capability, find_spec("torchao") is not None, properties.total_memory)


@dataclass(frozen=True)
class Performance:
    """The optimizations that are applied to a model."""

    profile: str = "exact"
    """The profile in use, which may differ from the requested one."""
    optimizations: frozenset[Optimization] = field(default_factory=frozenset)
    left_out: tuple[str, ...] = ()
    """Messages about omitted optimizations, with the reasons."""
    backend: "CompilerBackend" = "inductor"
    """Passed to ``torch.compile``."""

    def without(self, optimization: Optimization, reason: str) -> "Performance":
        """Return a copy that omits an optimization for a reason."""
        message = f"{optimization} is left out: {reason}"
        profile = "fast" if optimization == "fp8" and self.profile == "fastest" else self.profile
        return replace(
            self,
            profile=profile,
            optimizations=self.optimizations - {optimization},
            left_out=(*self.left_out, message),
        )

    def __str__(self) -> str:
        done = ", ".join(sorted(self.optimizations)) or "nothing changed"
        return "; ".join([f"profile {self.profile}: {done}", *self.left_out])


EXACT = Performance()


def choose(
    profile: ProfileName,
    machine: Machine,
    *,
    weight_bytes: int = 0,
    without: Collection[Optimization] = (),
    has_adapters: bool = False,
    backend: "CompilerBackend" = "inductor",
) -> Performance:
    """Return the optimizations of a profile that are possible on a machine.

    Args:
        profile: the requested profile; ``auto`` is resolved by ``resolve_auto``.
        machine: the machine of the model.
        weight_bytes: size of transformer and VAE.
        without: optimizations to omit.
        has_adapters: whether LoRA adapters may be applied, which modify layers.
        backend: passed to ``torch.compile``.
    """
    if profile == "auto":
        profile = resolve_auto(machine, weight_bytes)
    performance = Performance(profile, PROFILES[profile] - frozenset(without), backend=backend)
    for optimization, reason in _obstacles(machine, has_adapters=has_adapters).items():
        if optimization in performance.optimizations:
            performance = performance.without(optimization, reason)
    return performance


def resolve_auto(machine: Machine, weight_bytes: int) -> ProfileName:
    """Return ``offload`` on a GPU with too little memory, ``fast`` on other GPUs with bfloat16, else ``exact``."""
    if machine.device_type != "cuda":
        return "exact"
    if machine.memory_bytes < weight_bytes + WORKING_BYTES:
        return "offload"
    return "fast" if machine.capability >= AMPERE else "exact"


def _obstacles(machine: Machine, *, has_adapters: bool) -> dict[Optimization, str]:
    """Return the optimizations that are not possible, with the reasons."""
    obstacles: dict[Optimization, str] = {}
    if has_adapters:
        obstacles["fused_qkv"] = "LoRA adapters change the layers that would be fused"
        obstacles["fp8"] = "LoRA adapters cannot be applied to 8-bit layers"
    elif machine.device_type != "cuda":
        obstacles["fp8"] = "it needs a GPU"
    elif machine.capability < FP8_CAPABILITY:
        has, needs = (".".join(map(str, version)) for version in (machine.capability, FP8_CAPABILITY))
        obstacles["fp8"] = f"the GPU has compute capability {has}, and {needs} is required"
    elif not machine.has_torchao:
        obstacles["fp8"] = "torchao is not installed (extra: quantization)"
    return obstacles
