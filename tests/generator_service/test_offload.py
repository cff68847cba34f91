"""Blocks offloaded to host memory. In these tests host and device are the same."""

from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.hooks import HookRegistry
from diffusers.hooks.group_offloading import ModuleGroup

from demo_model.services import WEIGHTS
from flux2_shared.model.folder import ModelFolder
from generator_service.lemica import schedule_for
from generator_service.pipelines.flux2 import Flux2Model, GenerationCancelled
from generator_service.pipelines.optimizations import offload
from generator_service.pipelines.optimizations.offload import ALIGNMENT, HOOK, gather_weights, offload_blocks
from generator_service.pipelines.optimizations.profiles import PROFILES, Performance
from generator_service.pipelines.params import Params, Reference
from tests.conftest import CPU, Serve
from tests.generator_service.test_flux2 import pattern

NUM_BLOCKS = 6


def wanted(cache: str | int = 3, *, seed: int = 0, has_reference: bool = False) -> Params:
    """A small image with mostly reused steps."""
    noise = torch.randn(1, 32, 384, generator=torch.Generator().manual_seed(seed))
    references = (Reference.of(pattern(64)),) if has_reference else ()
    return Params(noise, 64, 64, 4.0, seed, schedule_for(cache, 8), references)


@pytest.fixture(scope="module")
def offloaded() -> Flux2Model:
    """The demo model with its blocks offloaded."""
    folder = ModelFolder("weights", "local", WEIGHTS)
    performance = Performance("offload", PROFILES["offload"])
    return Flux2Model.load(folder, CPU, torch.float32, performance=performance)


class Moves:
    """Records which blocks were moved."""

    def __init__(self) -> None:
        self.arrived = 0
        self.there: set[int] = set()
        self.most = 0

    def came(self, group: object) -> None:
        """A block's weights were copied to the device."""
        self.arrived += 1
        self.there.add(id(group))
        self.most = max(self.most, len(self.there))

    def went(self, group: object) -> None:
        """A block's weights were released."""
        self.there.discard(id(group))


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> Moves:
    """Record what diffusers moves."""
    counted, onload, offload = Moves(), ModuleGroup.onload_, ModuleGroup.offload_

    def counted_onload(group: ModuleGroup) -> None:
        counted.came(group)
        onload(group)

    def counted_offload(group: ModuleGroup) -> None:
        counted.went(group)
        offload(group)

    monkeypatch.setattr(ModuleGroup, "onload_", counted_onload)
    monkeypatch.setattr(ModuleGroup, "offload_", counted_offload)
    return counted


@pytest.mark.parametrize("request_", [wanted(), wanted("none"), wanted(seed=5, has_reference=True)])
def test_offloading_does_not_change_images(offloaded: Flux2Model, demo: Flux2Model, request_: Params) -> None:
    """Offloading only moves weights: images are bit-identical."""
    assert torch.equal(offloaded.generate(request_).latents, demo.generate(request_).latents)


def test_weights_of_a_block_are_gathered() -> None:
    """A block's weights are contiguous in one buffer of exactly their size, with unchanged values."""
    block = torch.nn.ModuleList([torch.nn.Linear(3, 5), torch.nn.Linear(7, 11).to(torch.bfloat16)])
    before = {name: parameter.clone() for name, parameter in block.named_parameters()}
    gather_weights(block, is_pinned=False)
    after = dict(block.named_parameters())
    assert all(torch.equal(after[name], value) and after[name].is_contiguous() for name, value in before.items())
    (memory,) = {parameter.untyped_storage().data_ptr() for parameter in after.values()}
    assert after["0.weight"].data_ptr() == memory
    assert after["0.weight"].untyped_storage().nbytes() == sum(
        -(-parameter.nbytes // ALIGNMENT) * ALIGNMENT for parameter in after.values()
    )


def test_weights_are_freed_when_the_gpu_has_used_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """After each block the host waits for the GPU, so that at most two blocks are in memory at once."""
    events: list[str] = []
    copying, computing = (SimpleNamespace(synchronize=partial(events.append, name)) for name in ("copy", "compute"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: copying)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: computing)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # PyTorch without CUDA cannot
    monkeypatch.setattr(offload, "gather_weights", lambda _block, *, is_pinned: events.append(f"pinned {is_pinned}"))
    transformer = torch.nn.Module()
    transformer.transformer_blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    transformer.single_transformer_blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    offload_blocks(transformer, torch.device("cuda", 0))
    block: Any = next(transformer.transformer_blocks.children())
    kept = block.weight.data
    events.clear()
    block.weight.data = torch.ones(2, 2)  # as if it had been copied there
    HookRegistry.check_if_exists_or_initialize(block).get_hook(HOOK).post_forward(block, None)
    assert events == ["compute"]
    assert block.weight.data_ptr() == kept.data_ptr()


def test_a_reused_step_moves_nothing(offloaded: Flux2Model, moves: Moves) -> None:
    """Blocks are copied only for computed steps."""
    arrived: list[int] = []
    schedule = wanted().schedule
    offloaded.generate(wanted(), lambda _step, _is_computed: arrived.append(moves.arrived))
    arrived.append(moves.arrived)
    moved = [after > before for before, after in pairwise(arrived)]
    assert moved == [schedule.is_computed(step) for step in range(schedule.num_steps)]


def test_two_blocks_are_on_the_device_at_once(offloaded: Flux2Model, moves: Moves) -> None:
    """The computing block and the next one are on the device; between steps only the first block remains."""
    offloaded.generate(wanted("none"))
    assert moves.most == 2
    assert len(moves.there) == 1


@pytest.mark.parametrize("block", [0, 3, NUM_BLOCKS - 1])
def test_a_failed_run_does_not_affect_the_next(offloaded: Flux2Model, demo: Flux2Model, block: int) -> None:
    """After an error inside a block, and after a cancelled run, the next image is unchanged."""
    transformer = offloaded.components.transformer
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]

    def fail(*_: object) -> None:
        raise RuntimeError("stop")

    hook = blocks[block].attn.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        offloaded.generate(wanted())
    hook.remove()
    assert torch.equal(offloaded.generate(wanted()).latents, demo.generate(wanted()).latents)

    def cancel(step: int, _is_computed: bool) -> None:
        if step == 1:
            raise GenerationCancelled

    with pytest.raises(GenerationCancelled):
        offloaded.generate(wanted("none"), cancel)
    assert torch.equal(offloaded.generate(wanted()).latents, demo.generate(wanted()).latents)


@pytest.mark.anyio
async def test_the_service_can_offload(serve_generator: Serve) -> None:
    """A service with this setting generates images, and records it in their files."""
    async with serve_generator(performance="offload") as http:
        response = await http.post("/generate", json={"prompt": "a red circle", "width": 64, "height": 64})
    assert response.status_code == 200
    assert b'"performance": "offload"' in response.content


@pytest.mark.anyio
async def test_adapters_are_refused_at_the_start(serve_generator: Serve, tmp_path: object) -> None:
    """Diffusers cannot add layers to offloaded blocks: the service refuses adapters and names both settings."""
    with pytest.raises(Exception, match="GENERATOR_LORA_DIR: adapters cannot be applied where GENERATOR_PERFORMANCE"):
        async with serve_generator(performance="offload", lora_dir=tmp_path):
            pass
