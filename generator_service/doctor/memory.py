"""Compares the memory that a model needs, according to the headers of its files, with that of the GPUs and the host.

All needs are estimates: the weights in their dtype, and an allowance for activations.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil, prod

from flux2_shared.model.subfolders import Service
from flux2_shared.settings import FLUX2_DEV
from generator_service.doctor.check import Check, failed, ok, skipped, warning
from generator_service.doctor.gpus import Placement
from generator_service.doctor.host import Memory
from generator_service.doctor.libraries import Gpu
from generator_service.doctor.model import Model
from generator_service.pipelines.optimizations.profiles import WORKING_BYTES

BLOCK = re.compile(r"((?:single_)?transformer_blocks\.\d+)\.")
LANGUAGE_MODEL = re.compile(r"^(?:model\.)?language_model\.(?:model\.)?")
LAYER = re.compile(r"layers\.(\d+)\.")
BYTES = {"bfloat16": 2, "float32": 4}
LINEAR_BYTES = {"int8": 1.0, "int4": 0.5 + 4 / 128}
"""Bytes per weight of a linear layer; int4 has a scale and a zero point per 128 weights."""
CUDA_BYTES = 10**9
"""GPU memory of the CUDA context, compiled code and the allocator's cache."""
HOST_BYTES = 10**9
"""Host memory of a process that has imported torch."""


@dataclass(frozen=True)
class Sizes:
    """Parameter counts of a model."""

    blocks: tuple[int, ...] = ()
    """Parameters of each transformer block."""
    outside_blocks: int = 0
    vae: int = 0
    encoder_linear: int = 0
    """Parameters of the text encoder's linear layers, which can be quantized."""
    encoder_rest: int = 0
    per_token: int = 0
    """Activations of the text encoder per token."""
    file_bytes: Mapping[Service, int] | None = None
    """Total size of the weight files that each service reads."""


FLUX2_DEV_SIZES = Sizes(
    blocks=(981_467_648,) * 8 + (490_733_824,) * 48,
    outside_blocks=816_316_416,
    vae=84_046_115,
    encoder_linear=30 * 555_745_280,
    encoder_rest=131_072 * 5120 + 30 * 2 * 5120,
    per_token=31 * 5120 + 3 * 32_768,
    file_bytes={Service.GENERATOR: 64_800_000_000, Service.TEXT_ENCODER: 48_000_000_000},
)
"""The sizes of FLUX.2 [dev], for hosts that have not downloaded it."""


@dataclass(frozen=True)
class Need:
    """The memory that a service needs, in bytes."""

    service: Service
    gpu: int
    """GPU memory; 0 on a CPU."""
    host: int
    """Peak host memory while loading."""
    how: str
    """A description of the weights, for the report."""
    smaller: tuple[tuple[str, int], ...] = ()
    """Settings that need less GPU memory, with the memory that they need."""


def sizes_of(model: Model) -> Sizes | None:
    """Read the sizes from the files' headers. If the model is absent: known sizes for FLUX.2 [dev], else None."""
    if model.path is None:
        return FLUX2_DEV_SIZES if model.name == FLUX2_DEV else None
    counts = {
        part: {name: prod(shape) for name, shape in weights.shapes.items()} for part, weights in model.weights.items()
    }
    blocks: dict[str, int] = {}
    transformer = counts.get("transformer", {})
    for name, count in transformer.items():
        match = BLOCK.match(name)
        if match:
            blocks[match[1]] = blocks.get(match[1], 0) + count
    linear, rest = _encoder_counts(model)
    text = model.configs.get("text_encoder", {}).get("text_config", {})
    num_states = max(model.prompt_format.hidden_layers) + 1
    return Sizes(
        blocks=tuple(blocks.values()),
        outside_blocks=sum(transformer.values()) - sum(blocks.values()),
        vae=sum(counts.get("vae", {}).values()),
        encoder_linear=linear,
        encoder_rest=rest,
        per_token=num_states * text.get("hidden_size", 0) + 3 * text.get("intermediate_size", 0),
        file_bytes={
            Service.GENERATOR: _file_bytes(model, ("transformer", "vae")),
            Service.TEXT_ENCODER: _file_bytes(model, ("text_encoder",)),
        },
    )


def _encoder_counts(model: Model) -> tuple[int, int]:
    """Count the parameters that the text encoder loads: in linear layers, and others."""
    linear = rest = 0
    weights = model.weights.get("text_encoder")
    num_layers = max(model.prompt_format.hidden_layers)
    for name, shape in weights.shapes.items() if weights else ():
        parameter = LANGUAGE_MODEL.sub("", name)
        layer = LAYER.match(parameter)
        if layer and int(layer[1]) < num_layers:
            linear, rest = (linear + prod(shape), rest) if len(shape) == 2 else (linear, rest + prod(shape))
        elif parameter.startswith("embed_tokens"):
            rest += prod(shape)
    return linear, rest


def _file_bytes(model: Model, parts: Iterable[str]) -> int:
    return sum(model.weights[part].num_bytes for part in parts if part in model.weights)


def generator_need(sizes: Sizes, gpu: Gpu | None, dtype: str, *, is_offloaded: bool, largest_file: int = 0) -> Need:
    """Estimate the generator's memory; weights are loaded to a GPU file by file."""
    size = BYTES[dtype]
    weights = (sum(sizes.blocks) + sizes.outside_blocks + sizes.vae) * size
    how = f"{weights / 1e9:.1f} GB of {dtype} weights"
    if gpu is None:
        return Need(Service.GENERATOR, 0, weights + HOST_BYTES, how)
    resident = (sizes.outside_blocks + sizes.vae + 2 * max(sizes.blocks, default=0)) * size + WORKING_BYTES
    if is_offloaded:
        pinned = sum(1 << (count * size - 1).bit_length() for count in sizes.blocks)  # rounded up to powers of two
        return Need(Service.GENERATOR, resident, pinned + HOST_BYTES, f"{how}, blocks in host memory")
    smaller = ((f"GENERATOR_PERFORMANCE=offload ({resident / 1e9:.0f} GB, slower)", resident),)
    return Need(Service.GENERATOR, weights + WORKING_BYTES, largest_file + HOST_BYTES, how, smaller)


def encoder_need(sizes: Sizes, gpu: Gpu | None, dtype: str, weights: str, num_tokens: int) -> Need:
    """Estimate the text encoder's memory for batches of ``num_tokens``; weights are loaded through host memory."""
    size = BYTES[dtype]
    whole = (sizes.encoder_linear + sizes.encoder_rest) * size
    working = num_tokens * sizes.per_token * size + (CUDA_BYTES if gpu else 0)

    def stored(kind: str) -> int:
        return round(sizes.encoder_linear * LINEAR_BYTES.get(kind, size)) + sizes.encoder_rest * size

    how = f"{stored(weights) / 1e9:.1f} GB of {dtype if weights == 'full' else weights} weights"
    if gpu is None:
        return Need(Service.TEXT_ENCODER, 0, whole + working + HOST_BYTES, how)
    totals = {kind: stored(kind) + working for kind in ("int8", "int4") if stored(kind) < stored(weights)}
    smaller = tuple((f"TEXT_ENCODER_WEIGHTS={kind} ({total / 1e9:.0f} GB)", total) for kind, total in totals.items())
    return Need(Service.TEXT_ENCODER, stored(weights) + working, whole + HOST_BYTES, how, smaller)


def check_gpu_memory(
    needs: Iterable[Need], placements: Mapping[Service, Placement], gpus: tuple[Gpu, ...], running: Iterable[Service]
) -> Iterator[Check]:
    """Check whether the services of each GPU fit into its total and its free memory."""
    on_gpus: dict[Gpu, list[Need]] = {}
    for need in needs:
        placement = placements.get(need.service)
        if placement and placement.gpu:
            on_gpus.setdefault(placement.gpu, []).append(need)
    if not on_gpus:
        yield skipped("gpu memory", "no service uses a GPU")
    for gpu, gpu_needs in on_gpus.items():
        yield _check_one(gpu, gpu_needs, gpus, set(running))


def _check_one(gpu: Gpu, needs: list[Need], gpus: tuple[Gpu, ...], running: set[Service]) -> Check:
    name = f"memory of gpu {gpu.index}"
    needed = sum(need.gpu for need in needs)
    parts = " + ".join(f"{need.service} {need.gpu / 1e9:.1f} GB ({need.how})" for need in needs)
    detail = f"about {needed / 1e9:.1f} GB are needed: {parts}; it has {gpu.total_bytes / 1e9:.1f} GB"
    if needed > gpu.total_bytes:
        return failed(name, detail, "; or ".join(_remedies(needs, gpu, gpus)))
    detail += f", of which {gpu.free_bytes / 1e9:.1f} GB are free"
    if needed <= gpu.free_bytes:
        return ok(name, detail)
    if running & {need.service for need in needs}:
        return ok(name, f"{detail}, with our own services running")
    fix = "stop the processes that use it (nvidia-smi); ignore this if it is a running service of this project"
    return failed(name, detail, fix)


def _remedies(needs: list[Need], gpu: Gpu, gpus: tuple[Gpu, ...]) -> Iterator[str]:
    """Suggest settings that would fit: those with the fewest changes, and of these the one that saves least."""
    if len(needs) > 1 and len(gpus) > 1:
        yield "use a separate GPU for each service: TEXT_ENCODER_DEVICE=cuda:0 and GENERATOR_DEVICE=cuda:1"
    options = [[("", need.gpu), *need.smaller] for need in needs]
    choices = sorted(product(*options), key=lambda chosen: (_num_changes(chosen), -_total(chosen)))
    for chosen in choices:
        if _total(chosen) <= gpu.total_bytes:
            yield " and ".join(setting for setting, _ in chosen if setting)
            break
    yield f"a GPU of at least {ceil(sum(need.gpu for need in needs) / 1e9)} GB"


def _num_changes(chosen: Sequence[tuple[str, int]]) -> int:
    return sum(bool(setting) for setting, _ in chosen)


def _total(chosen: Sequence[tuple[str, int]]) -> int:
    return sum(num_bytes for _, num_bytes in chosen)


def check_host_memory(needs: Iterable[Need], memory: Memory | None, running: Iterable[Service]) -> Iterator[Check]:
    """Check whether the host memory is sufficient to load the services."""
    needs = [need for need in needs if need.service not in set(running)]
    name = "host memory"
    if memory is None or not needs:
        yield skipped(name, "it cannot be read here" if memory is None else "the services are running")
        return
    needed = sum(need.host for need in needs)
    parts = " + ".join(f"{need.service} {need.host / 1e9:.1f} GB" for need in needs)
    detail = f"about {needed / 1e9:.1f} GB are needed while loading: {parts}; there are {memory.total / 1e9:.1f} GB"
    fix = "more memory, or a higher limit of the container (ENCODER_MEMORY, GENERATOR_MEMORY)"
    if needed > memory.total:
        yield failed(name, detail, fix)
    elif needed > memory.available:
        yield warning(name, f"{detail}, of which {memory.available / 1e9:.1f} GB are available", "end other programs")
    else:
        yield ok(name, f"{detail}, of which {memory.available / 1e9:.1f} GB are available")
