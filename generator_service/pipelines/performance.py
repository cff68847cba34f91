"""How a model is made fast: named profiles of optimisations, each of which can be left out.

``exact`` changes nothing: pictures equal diffusers' bit for bit. ``fast`` changes how the same numbers are computed,
so pictures differ by rounding. ``fastest`` computes the blocks' linear layers in 8-bit floating point.
"""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from importlib.util import find_spec

import torch

from generator_service.settings import Optimisation, ProfileName
from shared.compilation import Backend

PROFILES: dict[str, frozenset[Optimisation]] = {
    "exact": frozenset(),
    "fast": frozenset({"attention", "compile", "fused_qkv", "vae"}),
    "fastest": frozenset({"attention", "compile", "fp8", "fused_qkv", "vae"}),
}
FP8_CAPABILITY = (8, 9)
"""Ada and Hopper: the first with 8-bit floating point in their matrix units."""
AMPERE = (8, 0)
"""The first with bfloat16 in their matrix units, for which compiled code pays."""


@dataclass(frozen=True)
class Machine:
    """What of a machine decides about optimisations."""

    device_type: str
    capability: tuple[int, int] = (0, 0)
    """Of a CUDA device."""
    has_torchao: bool = False

    @classmethod
    def of(cls, device: torch.device) -> "Machine":
        """The machine that this runs on."""
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
        return cls(device.type, capability, find_spec("torchao") is not None)


@dataclass(frozen=True)
class Performance:
    """What is done to a model."""

    profile: str = "exact"
    """The one that is used, which may not be the one that was asked for."""
    optimisations: frozenset[Optimisation] = field(default_factory=frozenset)
    left_out: tuple[str, ...] = ()
    """What cannot be done here and why, for people."""
    backend: Backend = "inductor"
    """As ``torch.compile``'s."""

    def without(self, optimisation: Optimisation, reason: str) -> "Performance":
        """The same but for one thing that cannot be done."""
        told = f"{optimisation} is left out: {reason}"
        profile = "fast" if optimisation == "fp8" and self.profile == "fastest" else self.profile
        return replace(
            self,
            profile=profile,
            optimisations=self.optimisations - {optimisation},
            left_out=(*self.left_out, told),
        )

    def __str__(self) -> str:
        done = ", ".join(sorted(self.optimisations)) or "nothing changed"
        return "; ".join([f"profile {self.profile}: {done}", *self.left_out])


EXACT = Performance()


def choose(
    profile: ProfileName, machine: Machine, *, without: Collection[Optimisation] = (), has_adapters: bool = False
) -> Performance:
    """What of a profile can be done.

    Args:
        profile: ``auto`` is ``fast`` on a GPU that has bfloat16, else ``exact``.
        machine: where.
        without: what is not wanted.
        has_adapters: whether LoRA adapters may be applied, which change single layers.
    """
    if profile == "auto":
        is_gpu = machine.device_type == "cuda" and machine.capability >= AMPERE
        profile = "fast" if is_gpu else "exact"
    performance = Performance(profile, PROFILES[profile] - frozenset(without))
    for optimisation, reason in _obstacles(machine, has_adapters=has_adapters).items():
        if optimisation in performance.optimisations:
            performance = performance.without(optimisation, reason)
    return performance


def _obstacles(machine: Machine, *, has_adapters: bool) -> dict[Optimisation, str]:
    """What cannot be done here, and why."""
    obstacles: dict[Optimisation, str] = {}
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
