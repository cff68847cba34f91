"""How much GPU memory FLUX.2 [dev] needs under each profile, counted without a GPU: ``python -m benchmarks.memory``.

The service's own code generates images at full size on the meta device (``benchmarks.meta_model``), and the bytes of
all tensors that are alive at once are counted: weights, activations, cached features and decoding. For the text
encoder likewise. Added to them are what the cache of reference images may hold, and an allowance for what cannot be
counted: the CUDA context, workspaces of the libraries and the allocator's rounding. A convolution is assumed to copy
its input and its output once. Compiled code is assumed to hold no more than uncompiled code. LoRA adapters come on
top. Prints a card, tables and, last, one JSON line; its figures are bytes.
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
from benchmarks.card import machine_card, show
from benchmarks.drawing import GUIDANCE, LARGEST_REFERENCE, Shape
from benchmarks.language_model import Model, empty_model
from benchmarks.memory_tables import memory_section
from benchmarks.meta_model import META, meta_model, num_bytes, on_meta, tensors_of
from benchmarks.peak_memory import PeakMemory
from benchmarks.synthetic import Source, empty_components
from generator_service.lemica import Fitted, Schedule, Signature
from generator_service.pipelines.components import Components
from generator_service.pipelines.flux2 import REFERENCE_CACHE_BYTES
from generator_service.pipelines.optimizations.offload import gathered_sizes
from generator_service.pipelines.params import Params, Reference
from text_encoder_service.encoder import run_library, to_pinned

ALLOWANCE_BYTES = 2 * 10**9
"""For each service, not measured: its CUDA context, workspaces of cuBLAS and cuDNN, and the allocator's rounding."""
RESIDENT_PROFILES = ("exact", "fast", "fastest")
"""Those that keep all weights on the GPU."""
ENCODER_BATCHES = (1, 2, 8)
"""The last is the default of ``TEXT_ENCODER_MAX_BATCH``."""
SCHEDULE = Schedule("counted", 5, (0, 1, 2, 3), "benchmark", Signature("any", 5), Fitted({4: (1.0, 0.0, 0.0)}))
"""With the predictor that keeps most; the last step is reused, so that what follows it is decoding alone."""


@dataclass(frozen=True)
class Case:
    """What is generated in one run."""

    shape: Shape
    num_images: int = 1
    """Images that share the run."""

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
    """The most bytes that are alive beside the weights in each phase of a run."""

    references: int
    """Before the first step: while reference images are encoded."""
    step: int
    """In a computed step with one cached feature, which is what plain reuse keeps."""
    predicted_step: int
    """In a computed step with three cached features, which is what the largest predictor keeps."""
    decode: int
    """After the last step, with three cached features."""


def workspace(operation: Any, args: tuple[Any, ...], result: Any) -> int:
    """A convolution may copy its input and its output into another layout."""
    if operation is torch.ops.aten.convolution.default:
        return int(args[0].nbytes + result.nbytes)
    return 0


def counted(path: Path, profile: str, case: Case) -> Peaks:
    """The peaks of one run of the service's model, a fresh one: it keeps reference images that it has encoded."""
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
    """A count in which the weights of ``modules`` are already alive, and their bytes."""
    memory = PeakMemory(META, workspace)
    for module in modules:
        memory.add(tensors_of(module))
    return memory, memory.take_peak()


def request(case: Case, path: Path, dtype: torch.dtype) -> Params:
    """What the service's model of a folder's architecture is given for each image of a case."""
    side, reference_side = case.shape.side, min(case.shape.side, LARGEST_REFERENCE)
    return Params(
        prompt_embeds=Source(path).embedding().to(dtype),
        width=side,
        height=side,
        guidance_scale=GUIDANCE,
        seed=0,
        schedule=SCHEDULE,
        references=(Reference(Image.new("RGB", (reference_side, reference_side))),) * case.shape.num_references,
    )


def generator_rows(profile: str, peaks: dict[str, Peaks], weights_bytes: int) -> list[dict[str, Any]]:
    """What a profile needs in each case."""
    rows = []
    for image, peak in peaks.items():
        most = max(asdict(peak).values())
        total = weights_bytes + most + REFERENCE_CACHE_BYTES + ALLOWANCE_BYTES
        rows.append({"profile": profile, "image": image, **asdict(peak), "total": total})
    return rows


def count_generator(path: Path) -> dict[str, Any]:
    """Weights and rows of all profiles."""
    exact = empty_components(path, torch.bfloat16)
    resident = num_bytes(exact.transformer, exact.vae)
    weights: dict[str, dict[str, int]] = {}
    rows: list[dict[str, Any]] = []
    peaks: dict[str, dict[str, Peaks]] = {}
    for profile in RESIDENT_PROFILES:
        parts = meta_model(path, profile).components
        running = num_bytes(parts.transformer, parts.vae)
        weights[profile] = {"running": running, "loading": resident, "host": 0}
        peaks[profile] = {str(case): counted(path, profile, case) for case in CASES}
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
    """The text encoder's weights, and what batches of full length take."""
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
    """What decoding would take if no kernel but PyTorch's fallback had the decoder's attention."""
    vae = empty_components(path, torch.bfloat16).vae
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    latents = torch.empty(1, vae.config.latent_channels, side // scale, side // scale, dtype=vae.dtype, device=META)
    memory, weights_bytes = tracked(vae)
    with on_meta(is_attention_fused=False), memory, torch.no_grad():
        vae.decode(latents)
    return memory.take_peak() - weights_bytes


def main() -> None:
    """Count, and print."""
    argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__).parse_args()
    card = machine_card()
    show(card)
    report = {
        "benchmark": "memory",
        "card": card,
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
