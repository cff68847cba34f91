"""What is compiled, and that it is compiled at start only; counted with a backend that compiles nothing."""

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
from generator_service.engine.warm_up import Batching
from generator_service.engine.worker import ImageWork, Worker
from generator_service.errors import NonFiniteOutput
from generator_service.pipelines.flux2 import Flux2Model, GeneratedImage
from generator_service.pipelines.lora import Adapter
from generator_service.pipelines.optimizations.profiles import Performance
from generator_service.pipelines.params import Params
from tests.generator_service.test_lora import adapter_file
from tests.generator_service.test_optimizations import OTHER_SIDE, SIDE, loaded, wanted

BATCHING = Batching(max_batch=3, max_pixels=SIDE * SIDE)


class CountingBackend:
    """A compiler backend that compiles nothing, and counts."""

    def __init__(self) -> None:
        self.graphs = 0
        self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> Callable[..., Any]:
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph.forward(*args)

        return run


@pytest.fixture(scope="module")
def backend() -> CountingBackend:
    """The backend of ``compiled``."""
    return CountingBackend()


@pytest.fixture(scope="module")
def compiled(backend: CountingBackend, demo: Flux2Model, tmp_path_factory: pytest.TempPathFactory) -> Flux2Model:
    """The demo model, compiled and warmed up, with an adapter available. Tests leave it as it is."""
    torch.compiler.reset()  # models of other tests have the same blocks, and their code counts for the limits
    folder = tmp_path_factory.mktemp("lora")
    adapter_file(folder / "ink.safetensors", demo)
    model = loaded("compile", "vae", backend=backend, lora_dir=folder)
    warm(model, (SIDE, SIDE), (SIDE, 2 * SIDE))
    return model


def difference(image: GeneratedImage, other_image: GeneratedImage) -> int:
    """The largest difference of all pixels."""
    ours, theirs = (np.asarray(each.image, dtype=int) for each in (image, other_image))
    return int(abs(ours - theirs).max())


def worker_of(model: Flux2Model, batching: Batching = BATCHING) -> Worker:
    """A worker for ``model`` that is not warmed up."""
    return Worker(model, DeviceThread(), LatencyModel(), GeneratorMetrics(), batching)


def warm(model: Flux2Model, *sizes: tuple[int, int]) -> None:
    """Start ``model`` as the service does."""
    worker_of(model).warm_up((32, model.info.embedding_width), sizes, ignore)


@pytest.fixture
def nothing_compiles(compiled: Flux2Model, backend: CountingBackend) -> Iterator[None]:
    """Fail the test if it compiles anything."""
    before = (backend.graphs, num_compilations())
    yield
    assert (backend.graphs, num_compilations()) == before


@pytest.mark.usefixtures("nothing_compiles")
def test_nothing_is_compiled_after_the_start(compiled: Flux2Model, backend: CountingBackend, demo: Flux2Model) -> None:
    """Computed and reused steps, other modes, numbers of steps, seeds and requests run code compiled at start."""
    for request in (wanted(), wanted(2), wanted(1, seed=5), wanted("fast", num_steps=9), wanted(3, seed=6)):
        before = backend.runs
        image = compiled.generate(request)
        assert backend.runs == before + 6 * request.schedule.num_computed + 1  # 6 blocks, and the decoder
        assert torch.equal(image.latents, demo.generate(request).latents)


def test_a_size_is_compiled_once(compiled: Flux2Model, backend: CountingBackend) -> None:
    """At start two types of blocks and the decoder are compiled for each size, and once for dynamic shapes."""
    assert compiled.performance.optimizations == {"compile", "vae"}
    blocks = 2 * 2 + 2 + 2  # dynamic shapes, for a single image and for batches
    assert backend.graphs - blocks - 2 in {1, 2}  # on some CPUs, convolutions of small inputs are other operations


@pytest.mark.usefixtures("nothing_compiles")
def test_compiled_code_runs_on_another_thread(compiled: Flux2Model, backend: CountingBackend) -> None:
    """Code that was compiled on the thread that starts the service runs on the device thread."""
    before = backend.runs
    with ThreadPoolExecutor(1) as thread:
        thread.submit(compiled.generate, wanted(2)).result()
    assert backend.runs == before + 6 * 2 + 1


@pytest.mark.usefixtures("nothing_compiles")
def test_other_sizes_run_compiled_blocks_too(compiled: Flux2Model, backend: CountingBackend, demo: Flux2Model) -> None:
    """An image of a size that was not warmed up uses the blocks and the decoder with dynamic shapes."""
    before = backend.runs
    request = wanted(2, side=OTHER_SIDE)
    image, plain = compiled.generate(request), demo.generate(request)
    assert torch.equal(image.latents, plain.latents)
    assert difference(image, plain) <= 1
    assert backend.runs == before + 6 * 2 + 1


@pytest.mark.usefixtures("nothing_compiles")
@pytest.mark.parametrize(("rows", "side"), [(2, SIDE), (3, SIDE), (2, OTHER_SIDE)])
def test_batches_run_compiled_blocks_too(
    compiled: Flux2Model, backend: CountingBackend, demo: Flux2Model, rows: int, side: int
) -> None:
    """A batch of any size uses the blocks compiled for batches; each image is decoded alone."""
    before = backend.runs
    requests = [wanted(2, seed=seed, side=side) for seed in range(rows)]
    latents = [image.latents for image in compiled.generate_batch(requests)]
    assert backend.runs == before + 6 * 2 + rows
    assert all(map(torch.equal, latents, [image.latents for image in demo.generate_batch(requests)]))


@pytest.mark.parametrize(("max_pixels", "side"), [(SIDE * SIDE + 1, SIDE), (2**24, 128), (255, None)])
def test_batches_are_warmed_up_at_sizes_that_share_runs(
    demo: Flux2Model, monkeypatch: pytest.MonkeyPatch, max_pixels: int, side: int | None
) -> None:
    """Warm-up sizes that are too large to share a run are not warmed up as batches."""
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


def test_batches_that_do_not_fit_are_disabled(
    demo: Flux2Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If a batch does not fit into memory, the service logs it at start and generates images one by one."""
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
    request = SimpleNamespace(is_followed=False, preview_steps=())
    generation = SimpleNamespace(is_followed=False, request=request)
    work = cast("ImageWork", SimpleNamespace(params=wanted(), index=0, generation=generation))
    assert worker.batch_key(work) is None


@pytest.mark.usefixtures("nothing_compiles")
def test_compiled_code_is_used_again_after_an_adapter(compiled: Flux2Model, backend: CountingBackend) -> None:
    """The layers that an adapter changes run uncompiled; the next image runs compiled code again."""
    plain = compiled.generate(wanted())
    before = backend.runs
    inked = compiled.generate(wanted(adapters=(Adapter("ink"),)))
    assert backend.runs < before + 6 * 4 + 1
    before = backend.runs
    again = compiled.generate(wanted())
    assert backend.runs == before + 6 * 4 + 1
    assert torch.equal(plain.latents, again.latents)
    assert not torch.equal(plain.latents, inked.latents)


@pytest.mark.usefixtures("nothing_compiles")
def test_a_decoder_that_gives_no_numbers_is_refused(compiled: Flux2Model, demo: Flux2Model) -> None:
    """If the decoder gives NaN compiled or not, the image is refused, and compiled code is kept."""
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
