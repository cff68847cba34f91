"""Schedules: which steps of a run are computed, and how the others are predicted. Does not import torch.

The published lists are those of LeMiCa's authors for FLUX.2 with 50 steps. For other numbers of steps a list is
resampled, which its ``source`` says. Calibrated schedules are loaded from files.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from generator_service.lemica.errors import ScheduleMismatch
from generator_service.lemica.files import write_json
from generator_service.lemica.predictor import Predictor, Reuse, predictor_from_json, predictor_to_json
from generator_service.lemica.signature import Signature

FORMAT = "lemica-schedules/1"
NAME = r"[A-Za-z0-9_.,+ -]{1,64}"
"""A schedule's name is used in headers and file names."""

PUBLISHED_STEPS = 50
PUBLISHED_FOR = Signature("FLUX.2", PUBLISHED_STEPS)
PUBLISHED: MappingProxyType[str, tuple[int, ...]] = MappingProxyType(
    {
        "slow": (*range(21), 27, 34, 41, 47, 49),
        "medium": (*range(15), 21, 28, 35, 42, 49),
        "fast": (0, 1, 2, 3, 4, 5, 8, 9, 15, 21, 27, 33, 39, 45, 49),
        "ultra": (0, 1, 4, 5, 9, 17, 25, 33, 41, 49),  # published for FLUX.2 [klein]
    }
)


@dataclass(frozen=True)
class Schedule:
    """Which of ``num_steps`` denoising steps run the transformer; the others are predicted from cached features."""

    name: str
    num_steps: int
    computed_steps: tuple[int, ...]
    source: str
    """``all`` (every step is computed), ``published``, ``resampled`` (from a published list) or ``calibrated``."""
    signature: Signature
    """The runs that the schedule is valid for."""
    predictor: Predictor = field(default_factory=Reuse)
    max_error: float | None = None
    """The largest error on the path of a calibrated schedule."""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    """Measurements of a calibrated schedule on whole runs."""

    def __post_init__(self) -> None:
        if not re.fullmatch(NAME, self.name):
            raise ScheduleMismatch(
                f"a schedule's name has 1 to 64 of A-Z a-z 0-9 _ . , + - and spaces, not {self.name[:80]!r}"
            )
        steps = self.computed_steps
        if not steps or steps[0] != 0:
            raise ScheduleMismatch("a schedule must compute step 0: there is nothing to reuse before it")
        if any(later <= earlier for earlier, later in pairwise(steps)):
            raise ScheduleMismatch("computed steps must increase")
        if steps[-1] >= self.num_steps:
            raise ScheduleMismatch(f"step {steps[-1]} lies outside a run of {self.num_steps} steps")

    def is_computed(self, step: int) -> bool:
        return step in self.computed_steps

    @property
    def num_computed(self) -> int:
        return len(self.computed_steps)

    def __str__(self) -> str:
        return f"{self.name}; source={self.source}; predictor={self.predictor.name}; signature={self.signature}"

    def save(self, path: Path | str) -> None:
        """Write a file with this schedule only."""
        save_schedules([self], path)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a file with one schedule.

        Raises:
            ScheduleMismatch: the file is invalid, or does not hold exactly one schedule.
        """
        schedules = load_schedules(path)
        if len(schedules) != 1:
            raise ScheduleMismatch(f"{Path(path).name} holds {len(schedules)} schedules, not one")
        return cls(**vars(schedules[0]))


def save_schedules(schedules: Iterable[Schedule], path: Path | str) -> None:
    """Write schedules into one JSON file, atomically."""
    entries = [
        {
            "name": schedule.name,
            "num_steps": schedule.num_steps,
            "computed_steps": list(schedule.computed_steps),
            "source": schedule.source,
            "signature": schedule.signature.to_json(),
            "predictor": predictor_to_json(schedule.predictor),
            "max_error": schedule.max_error,
            "evidence": dict(schedule.evidence),
        }
        for schedule in schedules
    ]
    write_json(Path(path), {"format": FORMAT, "schedules": entries})


def load_schedules(path: Path | str) -> list[Schedule]:
    """Read the schedules in a file.

    Raises:
        ScheduleMismatch: the file does not hold valid schedules; the message says why.
    """
    name = Path(path).name
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ScheduleMismatch(f"{name} has format {data['format']!r}, not {FORMAT}")
        return [_schedule_from_json(entry) for entry in data["schedules"]]
    except (OSError, KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ScheduleMismatch(f"{name} is not a file of schedules") from error


def _schedule_from_json(entry: Mapping[str, Any]) -> Schedule:
    return Schedule(
        name=str(entry["name"]),
        num_steps=int(entry["num_steps"]),
        computed_steps=tuple(map(int, entry["computed_steps"])),
        source=str(entry["source"]),
        signature=Signature(**entry["signature"]),
        predictor=predictor_from_json(entry["predictor"]),
        max_error=None if entry["max_error"] is None else float(entry["max_error"]),
        evidence=dict(entry["evidence"]),
    )


def schedule_for(cache: str | int, num_steps: int) -> Schedule:
    """Return the schedule for a request's ``cache``, without calibrated ones.

    Args:
        cache: ``none``, a published name, or the number of steps to compute.
        num_steps: the length of the run.

    Raises:
        ScheduleMismatch: the name is unknown, or the number is not in 1..``num_steps``.
    """
    if cache in ("none", num_steps):
        return Schedule("none", num_steps, tuple(range(num_steps)), "all", Signature("any", num_steps))
    if isinstance(cache, int):
        return _of_size(cache, num_steps)
    if cache not in PUBLISHED:
        known = ", ".join(("none", *PUBLISHED))
        raise ScheduleMismatch(f"there is no schedule {cache!r}: choose one of {known}, or a number of computed steps")
    steps = PUBLISHED[cache]
    if num_steps == PUBLISHED_STEPS:
        return Schedule(cache, num_steps, steps, "published", PUBLISHED_FOR)
    return _resampled(cache, published_size(cache, num_steps), num_steps, cache)


def published_size(name: str, num_steps: int) -> int:
    """Return how many of ``num_steps`` steps the published schedule ``name`` computes: the same share as of 50."""
    return max(1, round(len(PUBLISHED[name]) * num_steps / PUBLISHED_STEPS))


def _of_size(num_computed: int, num_steps: int) -> Schedule:
    """Resample the published list whose share of computed steps is nearest."""
    if not 1 <= num_computed <= num_steps:
        raise ScheduleMismatch(f"cache: the number of computed steps must be 1 to {num_steps}, not {num_computed}")
    share = num_computed / num_steps

    def distance(name: str) -> float:
        return abs(len(PUBLISHED[name]) / PUBLISHED_STEPS - share)

    nearest = min(PUBLISHED, key=distance)
    if num_steps == PUBLISHED_STEPS and num_computed == len(PUBLISHED[nearest]):
        return schedule_for(nearest, num_steps)
    return _resampled(f"{num_computed} computed, like {nearest}", num_computed, num_steps, nearest)


def _resampled(name: str, num_computed: int, num_steps: int, origin: str) -> Schedule:
    """Resample the published list ``origin`` to ``num_computed`` of ``num_steps`` steps."""
    steps = resample(PUBLISHED[origin], PUBLISHED_STEPS, num_computed, num_steps)
    return Schedule(name, num_steps, steps, "resampled", PUBLISHED_FOR)


def resample(steps: tuple[int, ...], old_length: int, num_computed: int, new_length: int) -> tuple[int, ...]:
    """Resample a list of computed steps to another length of run and another number of computed steps.

    The list is interpolated linearly as a function from index to relative position, sampled at ``num_computed`` evenly
    spaced points and rounded. Steps that coincide are then moved apart; the first stays at 0, the last within the run.
    """
    resampled = []
    for k in range(num_computed):
        index = k * (len(steps) - 1) / max(1, num_computed - 1)
        low = min(int(index), len(steps) - 2)
        position = steps[low] + (index - low) * (steps[low + 1] - steps[low])
        resampled.append(round(position * (new_length - 1) / (old_length - 1)))
    for k in range(1, num_computed):
        resampled[k] = max(resampled[k], resampled[k - 1] + 1)
    for k in reversed(range(num_computed)):
        resampled[k] = min(resampled[k], new_length - num_computed + k)
    return tuple(resampled)
