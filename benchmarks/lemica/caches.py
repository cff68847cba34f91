"""Adapters for other caches of diffusers pipelines, which users could choose instead of LeMiCa."""

import contextlib
import copy
import io
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import (
    FirstBlockCacheConfig,
    Flux2Pipeline,
    MagCacheConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)

Count = Callable[[], int]
"""Returns the number of computed steps of the last run."""


@dataclass(frozen=True)
class Peer:
    """A cache with one parameter; a higher value computes fewer steps."""

    name: str
    install: Callable[[Flux2Pipeline, float], Count]
    values: tuple[float, ...]


def copy_pipeline(pipeline: Flux2Pipeline) -> Flux2Pipeline:
    """Copy a pipeline with its transformer, so that hooks of a cache do not affect the original."""
    copied = Flux2Pipeline(**{**pipeline.components, "transformer": copy.deepcopy(pipeline.transformer)})
    copied.set_progress_bar_config(disable=True)
    return copied


def count_calls(module: torch.nn.Module) -> Count:
    """Return a function that returns how often ``module`` ran since its last call."""
    runs = [0]
    module.register_forward_pre_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))

    def take() -> int:
        number, runs[0] = runs[0], 0
        return number

    return take


def mag_ratios(pipeline: Flux2Pipeline, call: Callable[[Flux2Pipeline], object], num_steps: int) -> list[float]:
    """Calibrate MagCache, and parse the ratios that it prints."""
    probe = copy_pipeline(pipeline)
    probe.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=num_steps))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        call(probe)
    match = re.search(r"\[([\d., e-]+)\]\s*$", printed.getvalue().strip())
    assert match is not None, "MagCache printed no ratios"
    return [float(number) for number in match[1].split(",")]


def mag_cache(ratios: list[float], num_steps: int) -> Peer:
    """Diffusers' MagCache with calibrated ratios."""

    def install(pipeline: Flux2Pipeline, threshold: float) -> Count:
        inner = pipeline.transformer.single_transformer_blocks[-1].attn
        config = MagCacheConfig(
            threshold=threshold, max_skip_steps=10, retention_ratio=0.1, num_inference_steps=num_steps,
            mag_ratios=torch.tensor(ratios),
        )  # fmt: skip
        pipeline.transformer.enable_cache(config)
        return count_calls(inner)

    return Peer(
        "MagCache (diffusers)", install, (0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
    )


def taylor_seer(num_steps: int) -> Peer:
    """Diffusers' TaylorSeer, within a cache context, which it requires and ``Flux2Pipeline`` does not enter."""

    def install(pipeline: Flux2Pipeline, interval: float) -> Count:
        config = TaylorSeerCacheConfig(cache_interval=round(interval), taylor_factors_dtype=torch.float32)
        pipeline.transformer.enable_cache(config)
        enter_context(pipeline.transformer)
        return count_calls(pipeline.transformer.single_transformer_blocks[-1].attn.to_out)

    return Peer("TaylorSeer (diffusers, in a context)", install, tuple(range(1, num_steps // 4)))


def enter_context(transformer: Any) -> None:
    """Run the transformer within a cache context, as newer caches of diffusers require."""
    inner = transformer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with transformer.cache_context("cond"):
            return inner(*args, **kwargs)

    transformer.forward = forward


def unsupported_caches(pipeline: Flux2Pipeline, call: Callable[[Flux2Pipeline], torch.Tensor]) -> dict[str, str]:
    """Return the caches of diffusers that do not work with FLUX.2, with their error or behavior."""
    reasons: dict[str, str] = {}
    reference = call(copy_pipeline(pipeline))
    for config in (FirstBlockCacheConfig(threshold=0.5), TaylorSeerCacheConfig(), SeaCacheConfig(threshold=5.0)):
        name = type(config).__name__.removesuffix("Config")
        probe = copy_pipeline(pipeline)
        try:
            probe.transformer.enable_cache(config)
            if torch.equal(call(probe), reference):
                reasons[name] = "computes every step"
        except (ValueError, TypeError) as error:
            reasons[name] = str(error).partition(".")[0]
    return reasons


def db_cache(*, has_taylor_seer: bool, warmup_steps: int = 4) -> Peer:
    """cache-dit's DBCache, with or without TaylorSeer."""

    def install(pipeline: Flux2Pipeline, threshold: float) -> Count:
        return enable_cache_dit(
            pipeline, has_taylor_seer, residual_diff_threshold=threshold, max_warmup_steps=warmup_steps
        )

    name = "DBCache + TaylorSeer (cache-dit)" if has_taylor_seer else "DBCache (cache-dit)"
    return Peer(name, install, tuple(0.01 * 1.15**k for k in range(32)))


def step_masks(num_steps: int, *, has_taylor_seer: bool) -> Peer:
    """cache-dit's step masks, based on LeMiCa according to its documentation. The parameter is the policy's index."""
    import cache_dit  # noqa: PLC0415 - an optional dependency

    policies = ("slow", "medium", "fast", "ultra")

    def install(pipeline: Flux2Pipeline, policy: float) -> Count:
        mask = cache_dit.steps_mask(total_steps=num_steps, mask_policy=policies[round(policy)])
        return enable_cache_dit(
            pipeline,
            has_taylor_seer,
            residual_diff_threshold=0.2,
            max_warmup_steps=1,
            num_inference_steps=num_steps,
            steps_computation_mask=mask,
            steps_computation_policy="static",
        )

    name = "step masks + TaylorSeer (cache-dit)" if has_taylor_seer else "step masks (cache-dit)"
    return Peer(name, install, tuple(range(len(policies))))


def fixed_mask(computed: Collection[int], num_steps: int, *, has_taylor_seer: bool) -> Peer:
    """cache-dit with given computed steps, to compare speed at equal computed steps. Has no parameter."""

    def install(pipeline: Flux2Pipeline, _value: float) -> Count:
        return enable_cache_dit(
            pipeline,
            has_taylor_seer,
            max_warmup_steps=1,
            num_inference_steps=num_steps,
            steps_computation_mask=[int(step in computed) for step in range(num_steps)],
            steps_computation_policy="static",
        )

    name = "DBCache + TaylorSeer (cache-dit)" if has_taylor_seer else "DBCache (cache-dit)"
    return Peer(name, install, (0.0,))


def eager_mag_cache(num_computed: int, num_steps: int) -> Peer:
    """Diffusers' MagCache that skips as many steps as its limit allows, to compare speed only."""
    first = max(1, num_steps // 10)  # steps that are always computed

    def install(pipeline: Flux2Pipeline, _value: float) -> Count:
        config = MagCacheConfig(
            threshold=1e9,
            max_skip_steps=max(1, round((num_steps - first) / max(1, num_computed - first)) - 1),
            retention_ratio=first / num_steps,
            num_inference_steps=num_steps,
            mag_ratios=torch.ones(num_steps),
        )
        pipeline.transformer.enable_cache(config)
        return count_calls(pipeline.transformer.single_transformer_blocks[-1].attn)

    return Peer("MagCache (diffusers)", install, (0.0,))


def even_taylor_seer(num_computed: int, num_steps: int) -> Peer:
    """Diffusers' TaylorSeer with the interval that computes about ``num_computed`` steps."""
    first = TaylorSeerCacheConfig().disable_cache_before_step
    interval = round((num_steps - first) / max(1, num_computed - first))
    return replace(taylor_seer(num_steps), values=(float(max(1, interval)),))


def enable_cache_dit(pipeline: Flux2Pipeline, has_taylor_seer: bool, **config: Any) -> Count:
    """Enable cache-dit. The first block is always computed, as its authors recommend."""
    import cache_dit  # noqa: PLC0415 - an optional dependency

    inner = pipeline.transformer.single_transformer_blocks[-1].attn
    options: dict[str, Any] = {}
    if has_taylor_seer:
        options["calibrator_config"] = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1)
    settings = cache_dit.DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=0, **config)
    cache_dit.enable_cache(pipeline, cache_config=settings, **options)
    return count_calls(inner)
