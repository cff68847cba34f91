"""Other caches for diffusers pipelines, as installed, behind one face: what a user could pick instead of LeMiCa."""

import contextlib
import copy
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import Flux2Pipeline, MagCacheConfig

Count = Callable[[], int]
"""How many steps of the last run were computed."""


@dataclass(frozen=True)
class Peer:
    """A cache with one knob: the higher, the fewer steps are computed."""

    name: str
    install: Callable[[Flux2Pipeline, float], Count]
    knobs: tuple[float, ...]


def fresh(pipeline: Flux2Pipeline) -> Flux2Pipeline:
    """The same pipeline around a copy of its transformer, so that no hook of a cache stays behind."""
    parts = {**pipeline.components, "transformer": copy.deepcopy(pipeline.transformer)}
    made = Flux2Pipeline(**parts)
    made.set_progress_bar_config(disable=True)
    return made


def counted(module: torch.nn.Module) -> Count:
    """Counts how often ``module`` runs between two calls."""
    runs = [0]
    module.register_forward_pre_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))

    def take() -> int:
        number, runs[0] = runs[0], 0
        return number

    return take


def mag_ratios(pipeline: Flux2Pipeline, call: Callable[[Flux2Pipeline], object], num_steps: int) -> list[float]:
    """MagCache's own calibration, which it prints."""
    probe = fresh(pipeline)
    probe.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=num_steps))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        call(probe)
    found = re.search(r"\[([\d., e-]+)\]\s*$", printed.getvalue().strip())
    assert found is not None, "MagCache printed no ratios"
    return [float(number) for number in found[1].split(",")]


def mag_cache(ratios: list[float], num_steps: int) -> Peer:
    """Diffusers' MagCache with the model's own ratios."""

    def install(pipeline: Flux2Pipeline, threshold: float) -> Count:
        inner = pipeline.transformer.single_transformer_blocks[-1].attn
        config = MagCacheConfig(
            threshold=threshold, max_skip_steps=10, retention_ratio=0.1, num_inference_steps=num_steps,
            mag_ratios=torch.tensor(ratios),
        )  # fmt: skip
        pipeline.transformer.enable_cache(config)
        return counted(inner)

    return Peer(
        "MagCache (diffusers)", install, (0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
    )


def db_cache(*, has_taylor_seer: bool, warmup_steps: int = 4) -> Peer:
    """cache-dit's DBCache, with or without TaylorSeer."""
    import cache_dit  # noqa: PLC0415 - an extra

    def install(pipeline: Flux2Pipeline, threshold: float) -> Count:
        inner = pipeline.transformer.single_transformer_blocks[-1].attn
        options: dict[str, Any] = {}
        if has_taylor_seer:
            options["calibrator_config"] = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1)
        cache_dit.enable_cache(
            pipeline,
            cache_config=cache_dit.DBCacheConfig(
                Fn_compute_blocks=1,
                Bn_compute_blocks=0,
                residual_diff_threshold=threshold,
                max_warmup_steps=warmup_steps,
            ),
            **options,
        )
        return counted(inner)

    name = "DBCache + TaylorSeer (cache-dit)" if has_taylor_seer else "DBCache (cache-dit)"
    return Peer(name, install, (0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2, 0.25, 0.3, 0.4, 0.6, 0.8, 1.2))
