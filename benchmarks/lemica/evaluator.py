"""Evaluates methods that skip steps, or lose precision, with the demo model."""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import Flux2Pipeline
from rich.progress import track

from benchmarks.lemica.caches import Peer, copy_pipeline
from demo_model.checker import mistakes, read_image
from demo_model.scenes import Scene, scenes
from demo_model.services import WEIGHTS
from flux2_shared.model.folder import ModelFolder, read_prompt_format
from generator_service.engine.quality import psnr, ssim
from generator_service.lemica import CachedTransformer, Schedule
from text_encoder_service.encoder import MistralEncoder

GUIDANCE = 4.0


@dataclass(frozen=True)
class Case:
    """A held-out prompt."""

    scene: Scene
    embedding: torch.Tensor
    seed: int


@dataclass(frozen=True)
class Outcome:
    """Results of one method over all cases. PSNR and SSIM are computed on float images with range 1."""

    name: str
    budget: int
    computed: float
    psnr: float
    psnr_worst_tenth: float
    psnr_worst: float
    ssim: float
    right: float
    seconds: float


Generate = Callable[[Case], tuple[torch.Tensor, int]]
"""Returns an image ``[3, H, W]`` in 0..1, and the number of computed steps."""


class Evaluator:
    """Evaluates methods with the demo model on held-out prompts."""

    def __init__(self, num_prompts: int, num_steps: int, side: int) -> None:
        folder = ModelFolder(WEIGHTS.name, "local", WEIGHTS)
        encoder = MistralEncoder(folder, read_prompt_format(folder), torch.device("cpu"), torch.float32)
        chosen = [s for n in (1, 2) for s in scenes(random.Random(10 + n), num_prompts // 2, n, held_out=True)]
        embeddings = encoder.encode([scene.prompt for scene in chosen])
        self.cases = [Case(s, e.tensor, 1000 + k) for k, (s, e) in enumerate(zip(chosen, embeddings, strict=True))]
        self.pipeline = Flux2Pipeline.from_pretrained(WEIGHTS, text_encoder=None, tokenizer=None, dtype=torch.float32)
        self.pipeline.set_progress_bar_config(disable=True)
        self.num_steps = num_steps
        self.side = side
        self.references = [self.call(self.pipeline, case) for case in track(self.cases, "references", transient=True)]

    def call(self, pipeline: Flux2Pipeline, case: Case, num_steps: int | None = None) -> torch.Tensor:
        """Generate an image with diffusers' pipeline."""
        image: torch.Tensor = pipeline(
            prompt_embeds=case.embedding,
            width=self.side,
            height=self.side,
            num_inference_steps=num_steps or self.num_steps,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(case.seed),
            output_type="pt",
        ).images[0]
        return image

    def plain(self, num_steps: int) -> Generate:
        """Return a method that runs fewer steps and computes all of them."""
        return lambda case: (self.call(self.pipeline, case, num_steps), num_steps)

    def scheduled(self, schedule: Schedule) -> Generate:
        """Return a method that applies a schedule to diffusers' pipeline."""
        components = self.pipeline.components

        def generate(case: Case) -> tuple[torch.Tensor, int]:
            transformer = CachedTransformer(components["transformer"], schedule, scheduler=components["scheduler"])
            pipeline = Flux2Pipeline(**{**components, "transformer": transformer})
            pipeline.set_progress_bar_config(disable=True)
            return self.call(pipeline, case), schedule.num_computed

        return generate

    def cached(self, peer: Peer, value: float) -> Generate:
        """Return a method that uses another cache."""
        pipeline = copy_pipeline(self.pipeline)
        count = peer.install(pipeline, value)
        return lambda case: (self.call(pipeline, case), count())

    def evaluate(self, name: str, budget: int, generate: Generate) -> Outcome:
        """Generate all cases and compare them to the references."""
        began = time.perf_counter()
        images = [generate(case) for case in self.cases]
        seconds = (time.perf_counter() - began) / len(images)
        ratios, similarities, right = [], [], 0
        for case, reference, (image, _) in zip(self.cases, self.references, images, strict=True):
            ours, full = (np.asarray(p.permute(1, 2, 0), dtype=np.float64) for p in (image, reference))
            ratios.append(min(psnr(ours, full, peak=1), 120.0))
            similarities.append(ssim(ours, full, peak=1))
            right += not mistakes(case.scene, read_image((image * 255).round()))
        ordered = sorted(ratios)
        return Outcome(
            name=name,
            budget=budget,
            computed=statistics.fmean(count for _, count in images),
            psnr=statistics.fmean(ratios),
            psnr_worst_tenth=statistics.fmean(ordered[: max(1, len(ordered) // 10)]),
            psnr_worst=ordered[0],
            ssim=statistics.fmean(similarities),
            right=right / len(images),
            seconds=seconds,
        )

    def value_for(self, peer: Peer, counts: dict[float, float], budget: int) -> float:
        """Return the parameter with the fewest computed steps of at least ``budget``, or else the nearest."""
        if not counts:
            probes = self.cases[:: max(1, len(self.cases) // 6)]
            for value in track(peer.values, peer.name, transient=True):
                generate = self.cached(peer, value)
                counts[value] = statistics.fmean(generate(case)[1] for case in probes)
        enough = [value for value, count in counts.items() if count >= budget]
        return min(enough or counts, key=lambda value: abs(counts[value] - budget))
