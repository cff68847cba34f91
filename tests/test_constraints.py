"""``constraints.txt``: the tested versions are installed, including CUDA's libraries on GPU hosts."""

from importlib.metadata import version

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.test_docs import ROOT

TORCH = "2.13.0"
BY_TORCH = {
    "cuda-bindings",
    "cuda-pathfinder",
    "cuda-toolkit",
    "nvidia-cublas",
    "nvidia-cuda-cupti",
    "nvidia-cuda-nvrtc",
    "nvidia-cuda-runtime",
    "nvidia-cudnn-cu13",
    "nvidia-cufft",
    "nvidia-cufile",
    "nvidia-curand",
    "nvidia-cusolver",
    "nvidia-cusparse",
    "nvidia-cusparselt-cu13",
    "nvidia-nccl-cu13",
    "nvidia-nvjitlink",
    "nvidia-nvshmem-cu13",
    "nvidia-nvtx",
    "triton",
}
"""The requirements of PyPI's CUDA build of this version, including transitive ones."""


def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_every_pin_is_exact_and_alone() -> None:
    """Each line pins one version of one package, and no package is pinned twice."""
    names = [canonicalize_name(pin.name) for pin in pins()]
    assert len(names) == len(set(names))
    for pin in pins():
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        assert "*" not in specifier.version


def test_gpu_dependencies_of_torch_are_pinned() -> None:
    """Triton and CUDA's libraries are pinned, only on Linux, where torch requires them."""
    markers = {canonicalize_name(pin.name): str(pin.marker) for pin in pins() if pin.marker is not None}
    assert markers == dict.fromkeys(BY_TORCH, 'platform_system == "Linux"')


def test_the_pins_for_gpus_match_the_pinned_torch() -> None:
    """A new torch needs new pins; CONTRIBUTING.md describes how to find them."""
    (torch,) = (pin for pin in pins() if pin.name == "torch")
    assert str(torch.specifier) == f"=={TORCH}"


@pytest.mark.parametrize("name", ["torch", "diffusers", "transformers"])
def test_installed_versions_are_pinned(name: str) -> None:
    """A build for another device, such as ``+cpu``, is the same version."""
    (pin,) = (pin for pin in pins() if pin.name == name)
    assert pin.specifier.contains(version(name))
