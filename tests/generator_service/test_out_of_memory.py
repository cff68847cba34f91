"""Images that do not fit into the device's memory: the fallbacks, and the state afterwards."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from demo_model.services import WEIGHTS
from flux2_shared.errors import OutOfMemory
from flux2_shared.model.folder import ModelFolder
from generator_service.errors import NonFiniteOutput
from generator_service.lemica import schedule_for
from generator_service.pipelines.callbacks import Previews
from generator_service.pipelines.flux2 import Flux2Model, GenerationCancelled
from generator_service.pipelines.lora import Adapter
from generator_service.pipelines.params import Params, Reference
from tests.conftest import CPU
from tests.generator_service.test_flux2 import pattern
from tests.generator_service.test_lora import adapter_file
from tests.memory_errors import EVERY_KIND, KINDS

STEPS = 8


def wanted(cache: str | int = 3, **more: Any) -> Params:
    """A small image with mostly reused steps."""
    noise = torch.randn(1, 32, 384, generator=torch.Generator().manual_seed(0))
    return replace(Params(noise, 64, 64, 4.0, 7, schedule_for(cache, STEPS)), **more)


@dataclass
class Shortage:
    """Raises an out-of-memory error the first times that something runs."""

    kind: str = "torch"
    num_failures: int = 1
    at_step: int = 0
    step: int = 0
    """The steps of the running attempt."""
    reported: list[tuple[int, bool]] = field(default_factory=list)
    """The reported steps of all attempts."""
    held: list[weakref.ref[torch.Tensor]] = field(default_factory=list)
    """Objects referenced by the frames of failed attempts."""

    def on_step(self, step: int, is_computed: bool) -> None:
        """The callback of a generation."""
        self.step = step
        self.reported.append((step, is_computed))

    def __call__(self, *_: object) -> None:
        """The hook of a module."""
        if self.step != self.at_step or len(self.held) == self.num_failures:
            return
        tensor = torch.ones(4)
        self.held.append(weakref.ref(tensor))
        error = KINDS[self.kind]()
        raise error

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self.reported]


@contextmanager
def hooked(module: torch.nn.Module, hook: Callable[..., None]) -> Iterator[None]:
    """Within the block ``hook`` is called before ``module`` runs."""
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def last_part(model: Flux2Model) -> torch.nn.Module:
    """The module that computed and reused steps have in common."""
    part: torch.nn.Module = model.components.transformer.proj_out
    return part


@pytest.mark.parametrize(("kind", "at_step"), list(zip(KINDS, cycle([0, 1, STEPS - 1]), strict=False)))
def test_a_retry_gives_the_same_image(demo: Flux2Model, kind: str, at_step: int) -> None:
    """An image that fits at the second attempt is bit-identical, with the requested schedule."""
    request, shortage = wanted(), Shortage(kind, at_step=at_step)
    expected = demo.generate(request).latents
    with hooked(last_part(demo), shortage):
        image = demo.generate(request, shortage.on_step)
    assert torch.equal(image.latents, expected)
    assert image.schedule is request.schedule
    steps = [(step, request.schedule.is_computed(step)) for step in range(STEPS)]
    assert shortage.reported == steps[: at_step + 1] + steps
    assert torch.equal(demo.generate(request).latents, expected)


@pytest.mark.parametrize("kind", ["torch", "cudnn"])
def test_the_decoder_may_fail_too(demo: Flux2Model, kind: str) -> None:
    """An out-of-memory error in the decoder is handled like one in a step."""
    request, shortage = wanted(), Shortage(kind, at_step=STEPS - 1)
    expected = demo.generate(request)
    with hooked(demo.components.vae.decoder, shortage):
        image = demo.generate(request, shortage.on_step)
    assert image.image.tobytes() == expected.image.tobytes()
    assert len(shortage.held) == 1


def test_a_reference_may_fail_too(demo: Flux2Model) -> None:
    """An out-of-memory error while a reference image is encoded leaves no partial result in the cache."""
    request, shortage = wanted(references=(Reference.of(pattern(112)),)), Shortage()
    with hooked(demo.components.vae.encoder, shortage):
        image = demo.generate(request, shortage.on_step)
    assert len(shortage.held) == 1
    assert torch.equal(image.latents, demo.generate(request).latents)


@pytest.mark.parametrize("kind", ["torch", "cublas", "compiler"])
def test_after_two_failures_every_step_is_computed(demo: Flux2Model, kind: str) -> None:
    """The third attempt keeps no cached features, and the image reports the schedule that was used."""
    shortage = Shortage(kind, num_failures=2, at_step=2)
    with hooked(last_part(demo), shortage):
        image = demo.generate(wanted(), shortage.on_step)
    assert image.schedule == schedule_for("none", STEPS)
    assert torch.equal(image.latents, demo.generate(wanted("none")).latents)
    assert shortage.reported[-STEPS:] == [(step, True) for step in range(STEPS)]
    assert torch.equal(demo.generate(wanted()).latents, demo.generate(wanted()).latents)


@pytest.mark.parametrize(("kind", "cache", "num_attempts"), [*((kind, 3, 3) for kind in KINDS), ("torch", "none", 2)])
def test_an_image_that_never_fits_is_refused(demo: Flux2Model, kind: str, cache: str | int, num_attempts: int) -> None:
    """After all attempts it is ``OutOfMemory`` without the library's message; other requests are served."""
    expected = demo.generate(wanted(cache)).latents
    shortage = Shortage(kind, num_failures=100, at_step=3)
    with hooked(last_part(demo), shortage), pytest.raises(OutOfMemory) as caught:
        demo.generate(wanted(cache), shortage.on_step)
    assert str(caught.value) == "an image of 64x64 does not fit into the device's memory now"
    assert shortage.steps == [0, 1, 2, 3] * num_attempts
    assert torch.equal(demo.generate(wanted(cache)).latents, expected)


def test_tensors_of_a_failed_attempt_are_released(demo: Flux2Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of a failed attempt is alive when the allocator's cache is emptied or when all attempts have failed."""
    alive: list[int] = []
    shortage = Shortage(num_failures=100, at_step=3)

    def count() -> None:
        alive.append(sum(tensor() is not None for tensor in shortage.held))

    monkeypatch.setattr(torch.cuda, "empty_cache", count)
    with hooked(last_part(demo), shortage), pytest.raises(OutOfMemory) as caught:
        demo.generate(wanted(), shortage.on_step)
    assert alive == [0, 0, 0]
    assert (caught.value.__cause__, caught.value.__context__) == (None, None)


@pytest.mark.parametrize("has_failed", [False, True])
def test_a_cancelled_generation_is_not_retried(demo: Flux2Model, has_failed: bool) -> None:
    """If a generation is cancelled during or after the first attempt, no further step runs."""
    shortage = Shortage(num_failures=int(has_failed), at_step=2)

    def cancel(step: int, is_computed: bool) -> None:
        shortage.on_step(step, is_computed)
        if len(shortage.held) == has_failed and (has_failed or step == 2):
            raise GenerationCancelled

    with hooked(last_part(demo), shortage), pytest.raises(GenerationCancelled):
        demo.generate(wanted(), cancel)
    assert shortage.steps == [0, 1, 2] + [0] * has_failed


def test_each_preview_is_sent_once(demo: Flux2Model) -> None:
    """A retry sends only the previews that are still missing."""
    shown: list[int] = []
    shortage = Shortage(num_failures=2, at_step=5)
    previews = Previews(frozenset({2, 4, 6}), lambda _image: shown.append(shortage.step))
    with hooked(last_part(demo), shortage):
        demo.generate(wanted(), shortage.on_step, previews)
    assert shown == [2, 4, 6]


def test_latents_that_are_not_finite_are_still_refused(demo: Flux2Model) -> None:
    """If every step is computed already, an image that is not finite is not generated again."""
    shortage = Shortage(num_failures=0)

    def spoil(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return torch.full_like(output, float("nan"))

    handle = last_part(demo).register_forward_hook(spoil)
    try:
        with pytest.raises(NonFiniteOutput):
            demo.generate(wanted("none"), shortage.on_step)
    finally:
        handle.remove()
    assert shortage.steps == list(range(STEPS))


@EVERY_KIND
def test_a_batch_that_does_not_fit_is_not_retried(demo: Flux2Model, kind: str) -> None:
    """A batch that runs out of memory is not retried as a whole: the caller generates its images one by one."""
    shortage = Shortage(kind, num_failures=100)
    with hooked(last_part(demo), shortage), pytest.raises(OutOfMemory, match="a run of 2 images of 64x64"):
        demo.generate_batch([wanted(), wanted()], shortage.on_step)
    assert shortage.steps == [0]


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_an_adapter_that_does_not_fit_is_removed(
    demo: Flux2Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An out-of-memory error while an adapter's layers are filled leaves no adapter active."""
    for seed, name in enumerate(("ink", "clay")):
        adapter_file(tmp_path / f"{name}.safetensors", demo, seed)
    model = Flux2Model.load(ModelFolder("weights", "local", WEIGHTS), CPU, torch.float32, tmp_path, max_loras=2)
    requests = [wanted(), *(wanted(adapters=(Adapter(name),)) for name in ("ink", "clay"))]
    plain, ink = (model.generate(request).latents for request in requests[:2])
    shortage, fill = Shortage(num_failures=100), peft.set_peft_model_state_dict

    def run_out(*args: Any, **more: Any) -> Any:
        fill(*args, **more)
        shortage()

    with monkeypatch.context() as patch:
        patch.setattr(peft, "set_peft_model_state_dict", run_out)
        with pytest.raises(OutOfMemory):
            model.generate(requests[2])
    assert torch.equal(model.generate(requests[0]).latents, plain)
    assert torch.equal(model.generate(requests[1]).latents, ink)
    clay = model.generate(requests[2]).latents
    assert not torch.equal(clay, plain)
    fresh = Flux2Model.load(ModelFolder("weights", "local", WEIGHTS), CPU, torch.float32, tmp_path, max_loras=2)
    assert torch.equal(clay, fresh.generate(requests[2]).latents)
