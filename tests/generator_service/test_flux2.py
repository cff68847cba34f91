"""Exactness: what LeMiCa changes, and what it must not."""

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import Flux2Pipeline
from PIL import Image

from demo_model.services import WEIGHTS
from generator_service.errors import NonFiniteOutput
from generator_service.lemica import CachedTransformer, Schedule, Signature, schedule_for
from generator_service.pipelines.flux2 import Flux2Model, GenerationCancelled
from generator_service.pipelines.params import Params, Reference
from tests.reference import denoise

MODES = ("none", "slow", "medium", "fast", "ultra", 12)


@pytest.fixture(scope="module")
def pipeline(weights: Path) -> Flux2Pipeline:
    """Diffusers' own pipeline with the same weights."""
    loaded = Flux2Pipeline.from_pretrained(weights, text_encoder=None, tokenizer=None, dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def embeddings(model: Flux2Model, seed: int = 0) -> torch.Tensor:
    """Random values in the shape of a prompt embedding."""
    return torch.randn(1, 32, model.info.embedding_width, generator=torch.Generator().manual_seed(seed))


def request(
    model: Flux2Model, schedule: Schedule, *, seed: int = 7, side: int = 128, references: tuple[Reference, ...] = ()
) -> Params:
    """A square image with ``schedule``."""
    return Params(embeddings(model), side, side, 4.0, seed, schedule, references)


def pattern(side: int) -> Image.Image:
    """A reference image."""
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_none_equals_the_pipeline(model: Flux2Model, pipeline: Flux2Pipeline) -> None:
    """Without a cache the image equals ``Flux2Pipeline``'s, pixel for pixel."""
    ours = model.generate(request(model, schedule_for("none", 50))).image
    theirs = pipeline(
        prompt_embeds=embeddings(model),
        width=128,
        height=128,
        guidance_scale=4.0,
        num_inference_steps=50,
        generator=torch.Generator().manual_seed(7),
    ).images[0]
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize("cache", MODES)
@pytest.mark.parametrize("num_steps", [50, 28, 4])
def test_every_mode_equals_the_reference_loop(
    model: Flux2Model, pipeline: Flux2Pipeline, cache: str | int, num_steps: int
) -> None:
    """Every mode at every number of steps gives the latents of the reference loop, bit for bit."""
    schedule = schedule_for(min(cache, num_steps) if isinstance(cache, int) else cache, num_steps)
    ours = model.generate(request(model, schedule)).latents
    plain = denoise(
        pipeline,
        embeddings(model),
        width=128,
        height=128,
        num_steps=num_steps,
        computed=set(schedule.computed_steps),
        seed=7,
    )
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("cache", ["none", "fast"])
def test_reference_images_keep_their_tokens_out_of_the_residual(
    model: Flux2Model, pipeline: Flux2Pipeline, cache: str
) -> None:
    """With reference images in the sequence the residual covers only the noisy tokens."""
    schedule = schedule_for(cache, 20)
    image = pattern(64)
    ours = model.generate(request(model, schedule, references=(Reference.of(image),))).latents
    plain = denoise(
        pipeline,
        embeddings(model),
        width=128,
        height=128,
        num_steps=20,
        computed=set(schedule.computed_steps),
        seed=7,
        references=[image],
    )
    assert torch.equal(ours, plain)


def test_all_steps_computed_is_none(model: Flux2Model) -> None:
    """A schedule that computes every step changes nothing."""
    everything = Schedule("all", 12, tuple(range(12)), "test", Signature("test", 12))
    assert torch.equal(
        model.generate(request(model, everything)).latents,
        model.generate(request(model, schedule_for("none", 12))).latents,
    )


def test_reuse_changes_the_image_slightly(demo: Flux2Model) -> None:
    """Latents with reused steps differ from computed ones, but by far less than those of two seeds."""
    none = demo.generate(request(demo, schedule_for("none", 50))).latents
    fast = demo.generate(request(demo, schedule_for("fast", 50))).latents
    other = demo.generate(request(demo, schedule_for("none", 50), seed=8)).latents
    assert 0 < (fast - none).abs().mean() < 0.5 * (other - none).abs().mean()


@pytest.mark.parametrize("failure", [GenerationCancelled, RuntimeError])
def test_a_cancelled_or_failed_generation_does_not_affect_the_next(demo: Flux2Model, failure: type[Exception]) -> None:
    """After a cancellation or an exception in mid-run, the next image is unchanged."""
    wanted = request(demo, schedule_for("fast", 20))
    expected = demo.generate(wanted).latents

    def fail_at_step_7(step: int, _is_computed: bool) -> None:
        if step == 7:
            raise failure

    with pytest.raises(failure):
        demo.generate(request(demo, schedule_for("ultra", 20), seed=1, side=256), fail_at_step_7)
    assert torch.equal(demo.generate(wanted).latents, expected)


def test_mixed_requests_from_many_threads_equal_their_serial_results(demo: Flux2Model) -> None:
    """200 requests of mixed modes, sizes, seeds and cancellations, prepared by 8 threads, equal their serial results.

    One thread owns the device, as the engine guarantees; everything else interleaves.
    """
    rng = random.Random(0)
    kinds = [(cache, side, seed) for cache in ("none", "fast", "ultra", 3) for side in (64, 80, 128) for seed in (1, 2)]
    requests = [(*rng.choice(kinds), rng.random() < 0.15) for _ in range(200)]
    serial = {
        kind: demo.generate(request(demo, schedule_for(kind[0], 8), side=kind[1], seed=kind[2])) for kind in kinds
    }

    def run(wanted_image: tuple[str | int, int, int, bool]) -> bool:
        cache, side, seed, is_cancelled = wanted_image
        wanted = request(demo, schedule_for(cache, 8), side=side, seed=seed)

        def on_step(step: int, _is_computed: bool) -> None:
            if is_cancelled and step == 5:
                raise GenerationCancelled

        try:
            generated = device.submit(demo.generate, wanted, on_step).result()
        except GenerationCancelled:
            return is_cancelled
        return torch.equal(generated.latents, serial[cache, side, seed].latents)

    with ThreadPoolExecutor(1) as device, ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, requests))


def test_a_seed_is_reproducible(demo: Flux2Model) -> None:
    """The same request twice gives the same image; another seed gives another."""
    first, second = (demo.generate(request(demo, schedule_for("medium", 10))).image for _ in range(2))
    other = demo.generate(request(demo, schedule_for("medium", 10), seed=8)).image
    assert np.array_equal(np.asarray(first), np.asarray(second))
    assert not np.array_equal(np.asarray(first), np.asarray(other))


def test_any_flux2_pipeline_can_be_accelerated(demo: Flux2Model) -> None:
    """Three lines around diffusers' own pipeline give the service's image."""
    loaded = Flux2Pipeline.from_pretrained(WEIGHTS, text_encoder=None, tokenizer=None, dtype=torch.float32)
    transformer = CachedTransformer(loaded.transformer, schedule_for("fast", 20), scheduler=loaded.scheduler)
    fast = Flux2Pipeline(**{**loaded.components, "transformer": transformer})
    image = fast(
        prompt_embeds=embeddings(demo),
        width=128,
        height=128,
        num_inference_steps=20,
        generator=torch.Generator().manual_seed(7),
    ).images[0]
    expected = demo.generate(request(demo, schedule_for("fast", 20))).image
    assert np.array_equal(np.asarray(image), np.asarray(expected))


@pytest.mark.parametrize("num_bad_runs", [1, 2])
def test_latents_that_are_not_finite_are_refused(demo: Flux2Model, num_bad_runs: int) -> None:
    """If latents are not finite, the image is generated once more with every step computed, and then refused."""
    wanted = request(demo, schedule_for("fast", 20))
    everything = schedule_for("none", 20)
    runs = [0]

    def spoil(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return torch.full_like(output, float("nan")) if runs[0] <= num_bad_runs else output

    def count_runs(step: int, _is_computed: bool) -> None:
        runs[0] += step == 0

    hook = demo.components.transformer.proj_out.register_forward_hook(spoil)
    try:
        if num_bad_runs == 1:
            image = demo.generate(wanted, count_runs)
            assert image.schedule == everything
            assert torch.equal(image.latents, demo.generate(request(demo, everything)).latents)
        else:
            with pytest.raises(NonFiniteOutput):
                demo.generate(wanted, count_runs)
    finally:
        hook.remove()
