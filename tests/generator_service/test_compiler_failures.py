"""Compilers that fail: the service starts, and its images are right."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from generator_service.pipelines.flux2 import Flux2Model
from tests.generator_service.test_compiled import CountingBackend, difference, warm
from tests.generator_service.test_optimizations import loaded, wanted


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """Discard compiled code and recompile limits of models of other tests, whose blocks have the same code."""
    torch.compiler.reset()


class BadDecoderBackend(CountingBackend):
    """A backend that cannot compile a decoder, or compiles it incorrectly."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        run = super().__call__(graph, inputs)
        if not any("conv2d" in str(node.target) for node in graph.graph.nodes):
            return run
        if self.fault == "fails":
            raise RuntimeError("no valid kernel for convolution")
        return lambda *args: [torch.full_like(output, float("nan")) for output in run(*args)]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("fails", "RuntimeError: no valid kernel"), ("gives NaN", "ArithmeticError: its output is not finite")],
)
def test_a_decoder_that_cannot_be_compiled_runs_uncompiled(demo: Flux2Model, fault: str, reason: str) -> None:
    """The blocks stay compiled, the image is right from the first one on, and the log has the reason."""
    backend = BadDecoderBackend(fault)
    model = loaded("compile", "vae", backend=backend)
    model.warm_up([wanted(2)])
    assert model.performance.optimizations == {"compile", "vae"}
    assert "the decoder could not be compiled" in str(model.performance)
    assert reason in str(model.performance)
    before = backend.runs
    image, plain = model.generate(wanted(2)), demo.generate(wanted(2))
    assert backend.runs == before + 6 * 2
    assert torch.equal(image.latents, plain.latents)
    assert difference(image, plain) <= 1


@pytest.mark.parametrize("fails_at", ["compiling", "running"])
def test_a_failing_compiler_falls_back_to_eager(demo: Flux2Model, fails_at: str) -> None:
    """The service starts uncompiled and logs the error; some compilers fail only when their code is run."""

    def fail(*_: object) -> None:
        raise RuntimeError("no C compiler was found")

    def broken(_graph: object, _inputs: object) -> Callable[..., None]:
        if fails_at == "compiling":
            fail()
        return fail

    model = loaded("compile", "vae", backend=broken)
    warm(model)
    assert model.performance.optimizations == {"vae"}
    assert "compile is left out: the model could not be compiled" in str(model.performance)
    assert "no C compiler was found" in str(model.performance)
    assert torch.equal(model.generate(wanted(2)).latents, demo.generate(wanted(2)).latents)
