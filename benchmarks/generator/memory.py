"""Computes the GPU memory of FLUX.2 [dev] under each profile, without a GPU: ``python -m benchmarks.generator.memory``.

Runs the services' code at full size on the meta device (``benchmarks.generator.meta_model``) and counts the bytes of
all live tensors: weights, activations, cached features and decoding. Adds the size of the cache of reference images,
and an allowance for memory that is not counted: the CUDA context, workspaces of libraries and rounding by the
allocator. Assumes that a convolution copies its input and output once, and that compiled code uses no more memory than
eager code. LoRA adapters are not included. Prints system information, tables and, as the last line, JSON with figures
in bytes.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from benchmarks.architectures import FULL
from benchmarks.encoder.language_model import Model, empty_model
from benchmarks.generator.engine import GUIDANCE, LARGEST_REFERENCE, Shape
from benchmarks.generator.meta_model import META, meta_model, num_bytes, on_meta, tensors_of
from benchmarks.generator.peak_memory import PeakMemory
from benchmarks.generator.synthetic import Source, empty_components
from benchmarks.report.memory_tables import memory_section
from benchmarks.report.system_info import show, system_info
from generator_service.lemica import Fitted, Schedule, Signature
from generator_service.pipelines.components import Components
from generator_service.pipelines.flux2 import REFERENCE_CACHE_BYTES
from generator_service.pipelines.optimizations.offload import gathered_sizes
from generator_service.pipelines.params import Params, Reference
from text_encoder_service.encoder import run_library, to_pinned

ALLOWANCE_BYTES = 2 * 10**9
"""Per service, not measured: CUDA context, workspaces of cuBLAS and cuDNN, and rounding by the allocator."""
RESIDENT_PROFILES = ("exact", "fast", "fastest")
"""Profiles that keep all weights on the GPU."""
ENCODER_BATCHES = (1, 2, 8)
"""The last is the default of ``TEXT_ENCODER_MAX_BATCH``."""
SCHEDULE = Schedule("counted", 5, (0, 1, 2, 3), "benchmark", Signature("any", 5), Fitted({4: (1.0, 0.0, 0.0)}))
"""Has the predictor with the most cached features. The last step is reused, so that only decoding follows it."""


@dataclass(frozen=True)
class Case:
    """The images of one run."""

    shape: Shape
    num_images: int = 1
    """Number of images that share the run."""

    def __str__(self) -> str:
        return f"{self.num_images} of {self.shape}" if self.num_images > 1 else str(self.shape)


CASES = (
    *(Case(Shape(side, num_references)) for side in (512, 1024, 2048) for num_references in (0, 1, 4)),
    Case(Shape(2048, 6)),  # as many tokens as GENERATOR_MAX_IMAGE_TOKENS allows by default
    Case(Shape(512), 4),
    Case(Shape(512), 8),
    Case(Shape(1024), 4),
)


@dataclass(frozen=True)
class Peaks:
    """Peak bytes in each phase of a run, without the weights."""

    references: int
    """Before the first step, while reference images are encoded."""
    step: int
    """In a computed step with one cached feature, as for plain reuse."""
    predicted_step: int
    """In a computed step with three cached features, as for the largest predictor."""
    decode: int
    """After the last step, with three cached features."""


def workspace(operation: Any, args: tuple[Any, ...], result: Any) -> int:
    """Return the temporary bytes of an operation: a convolution may copy its input and output to another layout."""
    if operation is torch.ops.aten.convolution.default:
        return int(args[0].nbytes + result.nbytes)
    return 0


def count_peaks(path: Path, profile: str, case: Case) -> Peaks:
    """Count the peaks of one run of a new model, because a model caches latents of reference images."""
    model = meta_model(path, profile)
    memory, weights = tracked(model.components.transformer, model.components.vae)
    peaks: list[int] = []
    with on_meta(), memory:
        requests = [request(case, path, model.dtype)] * case.num_images
        model.generate_batch(requests, lambda *_: peaks.append(memory.take_peak()))
    peaks.append(memory.take_peak())
    references, _, step, _, predicted_step, decode = (peak - weights for peak in peaks)
    return Peaks(references, step, predicted_step, decode)


def tracked(*modules: nn.Module) -> tuple[PeakMemory, int]:
    """Return a counter that includes the weights of ``modules``, and their bytes."""
    memory = PeakMemory(META, workspace)
    for module in modules:
        memory.add(tensors_of(module))
    return memory, memory.take_peak()


def request(case: Case, path: Path, dtype: torch.dtype) -> Params:
    """Return the parameters of each image of a case."""
    side, reference_side = case.shape.side, min(case.shape.side, LARGEST_REFERENCE)
    return Params(
        prompt_embeds=Source(path).embedding().to(dtype),
        width=side,
        height=side,
        guidance_scale=GUIDANCE,
        seed=0,
        schedule=SCHEDULE,
        references=(Reference.of(Image.new("RGB", (reference_side, reference_side))),) * case.shape.num_references,
    )


def generator_rows(profile: str, peaks: dict[str, Peaks], weights_bytes: int) -> list[dict[str, Any]]:
    """Return the memory of a profile in each case."""
    rows = []
    for image, peak in peaks.items():
        largest = max(asdict(peak).values())
        total = weights_bytes + largest + REFERENCE_CACHE_BYTES + ALLOWANCE_BYTES
        rows.append({"profile": profile, "image": image, **asdict(peak), "total": total})
    return rows


def count_generator(path: Path) -> dict[str, Any]:
    """Count the weights and the peaks of all profiles."""
    exact = empty_components(path, torch.bfloat16)
    resident = num_bytes(exact.transformer, exact.vae)
    weights: dict[str, dict[str, int]] = {}
    rows: list[dict[str, Any]] = []
    peaks: dict[str, dict[str, Peaks]] = {}
    for profile in RESIDENT_PROFILES:
        parts = meta_model(path, profile).components
        running = num_bytes(parts.transformer, parts.vae)
        weights[profile] = {"running": running, "loading": resident, "host": 0}
        peaks[profile] = {str(case): count_peaks(path, profile, case) for case in CASES}
        rows += generator_rows(profile, peaks[profile], running)
        print(f"{profile}: counted", flush=True)
    weights["offload"] = offloaded(exact)
    rows += generator_rows("offload", peaks["exact"], weights["offload"]["running"])  # it computes as exact does
    return {"weights": weights, "rows": rows}


def offloaded(parts: Components) -> dict[str, int]:
    """The weights where the blocks are in host memory: two of them at once are on the GPU."""
    transformer = parts.transformer
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    sizes = [num_bytes(block) for block in blocks]
    outside = num_bytes(transformer, parts.vae) - sum(sizes)
    two_blocks = max(first + second for first, second in pairwise([*sizes, sizes[0]]))
    pinned = (sum(gathered_sizes(block)) for block in blocks)
    host = sum(1 << (piece - 1).bit_length() for piece in pinned)  # PyTorch pins powers of two
    return {"running": outside + two_blocks, "loading": outside + two_blocks, "host": host}


def count_encoder(model: Model) -> dict[str, Any]:
    """Count the text encoder's weights, and its peaks for batches of full length."""
    batches = []
    for num_prompts in ENCODER_BATCHES:
        memory, weights_bytes = tracked(model.language_model)
        with on_meta(), memory, torch.no_grad():
            tokens = model.tokens(num_prompts, model.lengths[0])
            states = run_library(model.language_model, model.prompt_format.hidden_layers, tokens)
            to_pinned(states.flatten(2))
        peak = memory.take_peak()
        batches.append({"batch": num_prompts, "activations": peak - weights_bytes, "total": peak + ALLOWANCE_BYTES})
    return {"weights": num_bytes(model.language_model), "batches": batches}


def count_math_decode(path: Path, side: int) -> int:
    """Count the peak of decoding if the decoder's attention used PyTorch's fallback kernel."""
    vae = empty_components(path, torch.bfloat16).vae
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    latents = torch.empty(1, vae.config.latent_channels, side // scale, side // scale, dtype=vae.dtype, device=META)
    memory, weights_bytes = tracked(vae)
    with on_meta(is_attention_fused=False), memory, torch.no_grad():
        vae.decode(latents)
    return memory.take_peak() - weights_bytes


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.generator.memory", description=__doc__).parse_args()
    system = system_info()
    show(system)
    report = {
        "benchmark": "memory",
        "card": system,
        "allowance": ALLOWANCE_BYTES,
        "reference_cache": REFERENCE_CACHE_BYTES,
        "generator": count_generator(FULL),
        "encoder": count_encoder(empty_model(FULL)),
        "math_decode": {"2048x2048": count_math_decode(FULL, 2048)},
    }
    print("".join(memory_section(report)))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
