"""What is compiled and when: at start, and never again. Counted with a compiler that compiles nothing."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from generator_service.cost import CostModel
from generator_service.engine.worker import Batching, ImageWork, Worker
from generator_service.pipelines.flux2 import Flux2Model
from generator_service.pipelines.lora import Adapter
from generator_service.pipelines.performance import Performance
from shared.compilation import num_compilations
from shared.device_thread import DeviceThread
from shared.metrics import Metrics
from shared.report import ignore
from tests.generator_service.test_lora import adapter_file
from tests.generator_service.test_optimised import OTHER_SIDE, SIDE, loaded, wanted

BATCHING = Batching(max_batch=3, max_pixels=SIDE * SIDE)


@pytest.fixture(scope="module", autouse=True)
def fresh_compiler() -> None:
    """Models of other tests, whose blocks have the same code, leave nothing compiled."""
    torch.compiler.reset()


class Backend:
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


@pytest.fixture(scope="module")
def backend() -> Backend:
    """What ``compiled`` is compiled with."""
    return Backend()


@pytest.fixture(scope="module")
def compiled(backend: Backend, demo: Flux2Model, tmp_path_factory: pytest.TempPathFactory) -> Flux2Model:
    """The demo model, compiled, with an adapter at hand, and warm."""
    folder = tmp_path_factory.mktemp("lora")
    adapter_file(folder / "ink.safetensors", demo)
    model = loaded("compile", "vae", backend=backend, lora_dir=folder)
    warm(model, (SIDE, SIDE), (SIDE, 2 * SIDE))
    return model


def worker_of(model: Flux2Model, batching: Batching = BATCHING) -> Worker:
    """A worker for ``model``, cold."""
    return Worker(model, DeviceThread(), CostModel(), Metrics(), batching)


def warm(model: Flux2Model, *sizes: tuple[int, int]) -> None:
    """Start ``model`` as the service starts it."""
    worker_of(model).warm_up((32, model.card.embedding_width), sizes, ignore)


@pytest.fixture
def nothing_compiles(backend: Backend) -> Iterator[None]:
    """Fails the test if it compiled anything."""
    before = (backend.graphs, num_compilations())
    yield
    assert (backend.graphs, num_compilations()) == before


@pytest.mark.usefixtures("nothing_compiles")
def test_nothing_is_compiled_after_the_start(compiled: Flux2Model, backend: Backend, demo: Flux2Model) -> None:
    """Computed and reused steps, other modes, numbers of steps, seeds and requests run what was compiled at start."""
    for request in (wanted(), wanted(2), wanted(1, seed=5), wanted("fast", num_steps=9), wanted(3, seed=6)):
        before = backend.runs
        picture = compiled.generate(request)
        assert backend.runs == before + 6 * request.schedule.num_computed + 1  # 6 blocks, and the decoder
        assert torch.equal(picture.latents, demo.generate(request).latents)


def test_a_size_is_compiled_once(compiled: Flux2Model, backend: Backend) -> None:
    """At start two kinds of blocks and the decoder are compiled for each size, and the blocks for all others."""
    assert compiled.performance.optimisations == {"compile", "vae"}
    assert backend.graphs == 2 * 3 + 2 + 2  # once for a single picture and once for several


@pytest.mark.usefixtures("nothing_compiles")
def test_the_device_thread_runs_what_another_compiled(compiled: Flux2Model, backend: Backend) -> None:
    """What was compiled on the thread that starts the service is run on the one that draws."""
    before = backend.runs
    with ThreadPoolExecutor(1) as thread:
        thread.submit(compiled.generate, wanted(2)).result()
    assert backend.runs == before + 6 * 2 + 1


@pytest.mark.usefixtures("nothing_compiles")
def test_other_sizes_run_compiled_blocks_too(compiled: Flux2Model, backend: Backend, demo: Flux2Model) -> None:
    """A picture of a size that was not named at start uses the blocks for any size."""
    before = backend.runs
    request = wanted(2, side=OTHER_SIDE)
    assert torch.equal(compiled.generate(request).latents, demo.generate(request).latents)
    assert backend.runs == before + 6 * 2


@pytest.mark.usefixtures("nothing_compiles")
@pytest.mark.parametrize("rows", [2, 3])
def test_batches_run_compiled_blocks_too(compiled: Flux2Model, backend: Backend, demo: Flux2Model, rows: int) -> None:
    """However many pictures share a run, it uses the blocks for several; each is decoded as if it were alone."""
    before = backend.runs
    requests = [wanted(2, seed=seed) for seed in range(rows)]
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
    monkeypatch.setattr(
        Flux2Model, "prepare_batch", lambda _, batch, _kind: tried.append((len(batch), batch[0].width, batch[0].height))
    )
    monkeypatch.setattr(Flux2Model, "prepare", lambda _, request, _kind="this": demo.generate(request))
    shape = (32, demo.card.embedding_width)
    worker_of(demo, Batching(3, max_pixels)).warm_up(shape, [(SIDE, 2 * SIDE)], ignore)
    assert tried == ([] if side is None else [(2, side, side)])


def test_batches_that_do_not_fit_are_not_drawn(
    demo: Flux2Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A device that has too little memory for a batch serves its pictures one by one, and says so at start."""
    real = demo._generate

    def too_small(requests: list[Any], *more: Any) -> Any:
        if len(requests) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory at 0x7f")
        return real(requests, *more)

    monkeypatch.setattr(Flux2Model, "performance", Performance("fast", frozenset(["compile"])))
    monkeypatch.setattr(demo, "_generate", too_small)
    worker = worker_of(demo, BATCHING)
    worker.warm_up((32, demo.card.embedding_width), [(SIDE, SIDE)], ignore)
    assert "will not share runs: a run of 2 pictures of 64x64 does not fit" in caplog.text
    generation, order = SimpleNamespace(is_followed=False), SimpleNamespace(preview_steps=())
    work = cast("ImageWork", SimpleNamespace(params=wanted(), order=order, index=0, generation=generation))
    assert worker.batch_key(work) is None


@pytest.mark.usefixtures("nothing_compiles")
def test_adapters_do_not_stay_in_the_way(compiled: Flux2Model, backend: Backend) -> None:
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
    assert model.performance.optimisations == {"vae"}
    assert "compile is left out: the model could not be compiled" in str(model.performance)
    assert "no C compiler was found" in str(model.performance)
    assert torch.equal(model.generate(wanted(2)).latents, demo.generate(wanted(2)).latents)
