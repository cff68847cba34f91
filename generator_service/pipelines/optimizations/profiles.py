"""How a model is made fast: named profiles of optimizations, each of which can be left out.

``exact`` changes nothing: pictures equal diffusers' bit for bit. ``fast`` changes how the same numbers are computed,
so pictures differ by rounding. ``fastest`` computes the blocks' linear layers in 8-bit floating point. ``offload`` is
for GPUs that cannot hold the transformer.
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
"""What a GPU needs beside the weights: activations and decoding at 1024x1024, and CUDA itself."""
FP8_CAPABILITY = (8, 9)
"""Ada and Hopper: the first with 8-bit floating point in their matrix units."""
AMPERE = (8, 0)
"""The first with bfloat16 in their matrix units, for which compiled code pays."""


@dataclass(frozen=True)
class Machine:
    """What of a machine decides about optimizations."""

    device_type: str
    capability: tuple[int, int] = (0, 0)
    """Of a CUDA device."""
    has_torchao: bool = False
    memory_bytes: int = 0
    """Of a CUDA device, all of it."""

    @classmethod
    def of(cls, device: "torch.device") -> "Machine":
        """The machine that this runs on."""
        if device.type != "cuda":
            return cls(device.type)
        import torch  # noqa: PLC0415 - the choice of a profile needs no torch

        properties = torch.cuda.get_device_properties(device)
        capability = (properties.major, properties.minor)
        return cls(device.type, capability, find_spec("torchao") is not None, properties.total_memory)


@dataclass(frozen=True)
class Performance:
    """What is done to a model."""

    profile: str = "exact"
    """The one that is used, which may not be the one that was asked for."""
    optimizations: frozenset[Optimization] = field(default_factory=frozenset)
    left_out: tuple[str, ...] = ()
    """What cannot be done here and why, for people."""
    backend: "CompilerBackend" = "inductor"
    """As ``torch.compile``'s."""

    def without(self, optimization: Optimization, reason: str) -> "Performance":
        """The same but for one thing that cannot be done."""
        told = f"{optimization} is left out: {reason}"
        profile = "fast" if optimization == "fp8" and self.profile == "fastest" else self.profile
        return replace(
            self,
            profile=profile,
            optimizations=self.optimizations - {optimization},
            left_out=(*self.left_out, told),
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
    """What of a profile can be done.

    Args:
        profile: see ``resolve_auto``.
        machine: where.
        weight_bytes: of transformer and VAE.
        without: what is not wanted.
        has_adapters: whether LoRA adapters may be applied, which change single layers.
        backend: as ``torch.compile``'s.
    """
    if profile == "auto":
        profile = resolve_auto(machine, weight_bytes)
    performance = Performance(profile, PROFILES[profile] - frozenset(without), backend=backend)
    for optimization, reason in _obstacles(machine, has_adapters=has_adapters).items():
        if optimization in performance.optimizations:
            performance = performance.without(optimization, reason)
    return performance


def resolve_auto(machine: Machine, weight_bytes: int) -> ProfileName:
    """``offload`` on a GPU that cannot hold the weights, ``fast`` on another that has bfloat16, else ``exact``."""
    if machine.device_type != "cuda":
        return "exact"
    if machine.memory_bytes < weight_bytes + WORKING_BYTES:
        return "offload"
    return "fast" if machine.capability >= AMPERE else "exact"


def _obstacles(machine: Machine, *, has_adapters: bool) -> dict[Optimization, str]:
    """What cannot be done here, and why."""
    obstacles: dict[Optimization, str] = {}
    if has_adapters:
        obstacles["fused_qkv"] = "LoRA adapters change the layers that would be joined"
        obstacles["fp8"] = "LoRA adapters cannot be applied to 8-bit layers"
    elif machine.device_type != "cuda":
        obstacles["fp8"] = "it needs a GPU"
    elif machine.capability < FP8_CAPABILITY:
        has, needs = (".".join(map(str, version)) for version in (machine.capability, FP8_CAPABILITY))
        obstacles["fp8"] = f"the GPU has compute capability {has}, and {needs} is needed"
    elif not machine.has_torchao:
        obstacles["fp8"] = "torchao is not installed (the extra quantization)"
    return obstacles
