"""What is compiled and when: at start, and never again. Counted with a compiler that compiles nothing."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from flux2_shared.device.thread import DeviceThread
from flux2_shared.model.compilation import num_compilations
from flux2_shared.report import ignore
from generator_service.engine.latency import LatencyModel
from generator_service.engine.metrics import GeneratorMetrics
from generator_service.engine.worker import Batching, ImageWork, Worker
from generator_service.errors import NonFiniteOutput
from generator_service.pipelines.flux2 import Flux2Model, GeneratedImage
from generator_service.pipelines.lora import Adapter
from generator_service.pipelines.optimizations.profiles import Performance
from generator_service.pipelines.params import Params
from tests.generator_service.test_lora import adapter_file
from tests.generator_service.test_optimizations import OTHER_SIDE, SIDE, loaded, wanted

BATCHING = Batching(max_batch=3, max_pixels=SIDE * SIDE)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """Models of other tests, whose blocks have the same code, leave nothing compiled, and no limit half used up."""
    torch.compiler.reset()


class RecordingBackend:
    """A compiler that compiles nothing, and counts."""

    def __init__(self) -> None:
        self.graphs = 0
        self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> Callable[..., Any]:
        """As ``torch.compile`` calls a backend."""
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph.forward(*args)

        return run


@pytest.fixture
def backend() -> RecordingBackend:
    """What ``compiled`` is compiled with."""
    return RecordingBackend()


@pytest.fixture
def compiled(backend: RecordingBackend, demo: Flux2Model, tmp_path_factory: pytest.TempPathFactory) -> Flux2Model:
    """The demo model, compiled, with an adapter at hand, and warm."""
    folder = tmp_path_factory.mktemp("lora")
    adapter_file(folder / "ink.safetensors", demo)
    model = loaded("compile", "vae", backend=backend, lora_dir=folder)
    warm(model, (SIDE, SIDE), (SIDE, 2 * SIDE))
    return model


def difference(picture: GeneratedImage, other: GeneratedImage) -> int:
    """The largest of all pixels' values."""
    ours, theirs = (np.asarray(each.image, dtype=int) for each in (picture, other))
    return int(abs(ours - theirs).max())


def worker_of(model: Flux2Model, batching: Batching = BATCHING) -> Worker:
    """A worker for ``model``, cold."""
    return Worker(model, DeviceThread(), LatencyModel(), GeneratorMetrics(), batching)


def warm(model: Flux2Model, *sizes: tuple[int, int]) -> None:
    """Start ``model`` as the service starts it."""
    worker_of(model).warm_up((32, model.info.embedding_width), sizes, ignore)


@pytest.fixture
def nothing_compiles(compiled: Flux2Model, backend: RecordingBackend) -> Iterator[None]:
    """Fails the test if it compiled anything."""
    before = (backend.graphs, num_compilations())
    yield
    assert (backend.graphs, num_compilations()) == before


@pytest.mark.usefixtures("nothing_compiles")
def test_nothing_is_compiled_after_the_start(compiled: Flux2Model, backend: RecordingBackend, demo: Flux2Model) -> None:
    """Computed and reused steps, other modes, numbers of steps, seeds and requests run what was compiled at start."""
    for request in (wanted(), wanted(2), wanted(1, seed=5), wanted("fast", num_steps=9), wanted(3, seed=6)):
        before = backend.runs
        picture = compiled.generate(request)
        assert backend.runs == before + 6 * request.schedule.num_computed + 1  # 6 blocks, and the decoder
        assert torch.equal(picture.latents, demo.generate(request).latents)


def test_a_size_is_compiled_once(compiled: Flux2Model, backend: RecordingBackend) -> None:
    """At start two kinds of blocks and the decoder are compiled for each size, and once more for all others."""
    assert compiled.performance.optimizations == {"compile", "vae"}
    blocks = 2 * 2 + 2 + 2  # for all others, once for a single picture and once for several
    assert backend.graphs - blocks - 2 in {1, 2}  # on some CPUs, convolutions of small inputs are other operations


@pytest.mark.usefixtures("nothing_compiles")
def test_the_device_thread_runs_what_another_compiled(compiled: Flux2Model, backend: RecordingBackend) -> None:
    """What was compiled on the thread that starts the service is run on the one that draws."""
    before = backend.runs
    with ThreadPoolExecutor(1) as thread:
        thread.submit(compiled.generate, wanted(2)).result()
    assert backend.runs == before + 6 * 2 + 1


@pytest.mark.usefixtures("nothing_compiles")
def test_other_sizes_run_compiled_blocks_too(compiled: Flux2Model, backend: RecordingBackend, demo: Flux2Model) -> None:
    """A picture of a size that was not named at start uses the blocks and the decoder for any size."""
    before = backend.runs
    request = wanted(2, side=OTHER_SIDE)
    picture, plain = compiled.generate(request), demo.generate(request)
    assert torch.equal(picture.latents, plain.latents)
    assert difference(picture, plain) <= 1
    assert backend.runs == before + 6 * 2 + 1


@pytest.mark.usefixtures("nothing_compiles")
@pytest.mark.parametrize(("rows", "side"), [(2, SIDE), (3, SIDE), (2, OTHER_SIDE)])
def test_batches_run_compiled_blocks_too(
    compiled: Flux2Model, backend: RecordingBackend, demo: Flux2Model, rows: int, side: int
) -> None:
    """However many pictures share a run, it uses the blocks for several; each is decoded as if it were alone."""
    before = backend.runs
    requests = [wanted(2, seed=seed, side=side) for seed in range(rows)]
    latents = [picture.latents for picture in compiled.generate_batch(requests)]
    assert backend.runs == before + 6 * 2 + rows
    assert all(map(torch.equal, latents, [picture.latents for picture in demo.generate_batch(requests)]))


@pytest.mark.parametrize(("max_pixels", "side"), [(SIDE * SIDE + 1, SIDE), (2**24, 128), (255, None)])
def test_batches_are_prepared_at_a_size_that_they_are_drawn_at(
    demo: Flux2Model, monkeypatch: pytest.MonkeyPatch, max_pixels: int, side: int | None
) -> None:
    """Sizes that are warmed up may be too large to share a run; none that is not drawn so is tried at start."""
    tried: list[tuple[int, ...]] = []
    monkeypatch.setattr(Flux2Model, "performance", Performance("fast", frozenset(["compile"])))

    def warm_up(_model: Flux2Model, batch: Sequence[Params], _kind: str = "static") -> list[GeneratedImage]:
        if len(batch) > 1:
            tried.append((len(batch), batch[0].width, batch[0].height))
        return [demo.generate(params) for params in batch]

    monkeypatch.setattr(Flux2Model, "warm_up", warm_up)
    shape = (32, demo.info.embedding_width)
    worker_of(demo, Batching(3, max_pixels)).warm_up(shape, [(SIDE, 2 * SIDE)], ignore)
    assert tried == ([] if side is None else [(2, side, side)])


def test_batches_that_do_not_fit_are_not_drawn(
    demo: Flux2Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A device that has too little memory for a batch serves its pictures one by one, and says so at start."""
    real = demo._generate

    def too_small(requests: list[Any], *more: Any, **options: Any) -> Any:
        if len(requests) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory at 0x7f")
        return real(requests, *more, **options)

    monkeypatch.setattr(Flux2Model, "performance", Performance("fast", frozenset(["compile"])))
    monkeypatch.setattr(demo, "_generate", too_small)
    worker = worker_of(demo, BATCHING)
    worker.warm_up((32, demo.info.embedding_width), [(SIDE, SIDE)], ignore)
    assert "will not share runs: a run of 2 images of 64x64 does not fit" in caplog.text
    generation, order = SimpleNamespace(is_followed=False), SimpleNamespace(preview_steps=())
    work = cast("ImageWork", SimpleNamespace(params=wanted(), order=order, index=0, generation=generation))
    assert worker.batch_key(work) is None


@pytest.mark.usefixtures("nothing_compiles")
def test_adapters_do_not_stay_in_the_way(compiled: Flux2Model, backend: RecordingBackend) -> None:
    """With an adapter the layers that it changes run uncompiled; the next picture runs what was compiled, as before."""
    plain = compiled.generate(wanted())
    before = backend.runs
    inked = compiled.generate(wanted(adapters=(Adapter("ink"),)))
    assert backend.runs < before + 6 * 4 + 1
    before = backend.runs
    again = compiled.generate(wanted())
    assert backend.runs == before + 6 * 4 + 1
    assert torch.equal(plain.latents, again.latents)
    assert not torch.equal(plain.latents, inked.latents)


class BadDecoderBackend(RecordingBackend):
    """One that cannot compile a decoder, or compiles it wrongly."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        """As ``torch.compile`` calls a backend."""
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
    """The blocks stay compiled, the picture is right from the first one on, and it is said why."""
    backend = BadDecoderBackend(fault)
    model = loaded("compile", "vae", backend=backend)
    model.warm_up([wanted(2)])
    assert model.performance.optimizations == {"compile", "vae"}
    assert "the decoder could not be compiled" in str(model.performance)
    assert reason in str(model.performance)
    before = backend.runs
    picture, plain = model.generate(wanted(2)), demo.generate(wanted(2))
    assert backend.runs == before + 6 * 2
    assert torch.equal(picture.latents, plain.latents)
    assert difference(picture, plain) <= 1


@pytest.mark.usefixtures("nothing_compiles")
def test_a_decoder_that_gives_no_numbers_is_refused(compiled: Flux2Model, demo: Flux2Model) -> None:
    """If the decoder gives NaN compiled or not, there is no picture; what is compiled is kept."""
    for model in (compiled, demo):
        bias = model.components.vae.decoder.conv_out.bias
        before = bias.clone()
        bias[0] = float("nan")
        try:
            with pytest.raises(NonFiniteOutput, match="decoder"):
                model.generate(wanted(2))
        finally:
            bias.copy_(before)
    assert compiled.performance.left_out == ()
    assert torch.equal(compiled.generate(wanted(2)).latents, demo.generate(wanted(2)).latents)


@pytest.mark.parametrize("fails_at", ["compiling", "running"])
def test_a_compiler_that_fails_is_done_without(demo: Flux2Model, fails_at: str) -> None:
    """The service starts uncompiled, and says why and with what; some compilers fail only when their code is run."""

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
