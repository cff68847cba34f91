"""Lookup of calibrated schedules by signature. Does not import torch."""

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from generator_service.lemica.errors import ScheduleMismatch
from generator_service.lemica.schedule import (
    PUBLISHED,
    Schedule,
    load_schedules,
    published_size,
    schedule_for,
)
from generator_service.lemica.signature import Signature

logger = logging.getLogger("flux2")

SHIPPED = Path(__file__).parent / "schedules"
"""The folder of calibrated schedules that are part of this package."""


class ScheduleRegistry:
    """Schedules of one model. A schedule is used only for runs that match its signature."""

    def __init__(self, schedules: Iterable[Schedule] = ()) -> None:
        self.schedules = tuple(schedules)

    def has(self, cache: str | int) -> bool:
        """Whether some request can use ``cache``."""
        if isinstance(cache, int):
            return cache >= 1
        return cache in ("none", *PUBLISHED) or any(schedule.name == cache for schedule in self.schedules)

    def find(self, cache: str | int, wanted: Signature) -> Schedule:
        """Return the schedule for a request's ``cache``.

        Args:
            cache: ``none``, the name of a published or calibrated schedule, or the number of steps to compute.
            wanted: the signature of the request.

        Returns:
            A calibrated schedule with a matching signature if there is one; else the published list, resampled if the
            run does not have 50 steps.

        Raises:
            ScheduleMismatch: there is no such schedule, or it was made for another kind of run; the message says which.
        """
        num_steps = wanted.num_steps
        if cache == "none":
            return schedule_for(cache, num_steps)
        num_computed = published_size(cache, num_steps) if isinstance(cache, str) and cache in PUBLISHED else cache
        for schedule in self.schedules:
            is_candidate = num_computed in (schedule.num_computed, schedule.name)
            if is_candidate and schedule.signature.mismatch(wanted) is None:
                return replace(schedule, name=str(cache)) if isinstance(cache, str) else schedule
        for schedule in self.schedules:
            if schedule.name == cache and cache not in PUBLISHED:
                raise ScheduleMismatch(f"schedule {cache!r} was {schedule.signature.mismatch(wanted)}")
        return schedule_for(cache, num_steps)

    def cheapest_within(self, max_error: float, wanted: Signature) -> Schedule:
        """Return the calibrated schedule with the fewest computed steps whose ``max_error`` is within the bound.

        If no schedule is, the returned one computes every step.

        Raises:
            ScheduleMismatch: no calibrated schedule matches ``wanted``.
        """
        matching = [schedule for schedule in self.schedules if schedule.signature.mismatch(wanted) is None]
        if not matching:
            raise ScheduleMismatch(f"max_error needs a calibrated schedule, and there is none for {wanted}")
        good = [s for s in matching if s.max_error is not None and s.max_error <= max_error]
        return min(good, key=lambda s: s.num_computed) if good else schedule_for("none", wanted.num_steps)


def load_registry(folders: Iterable[Path], model: str) -> ScheduleRegistry:
    """Load the schedules in ``folders`` that were made for ``model``; others are skipped and logged.

    Args:
        folders: folders with ``*.json`` files of schedules.
        model: the model's fingerprint, as in ``Signature.model``.

    Raises:
        ScheduleMismatch: a file does not hold valid schedules.
    """
    accepted: list[Schedule] = []
    for file in sorted(file for folder in folders for file in folder.glob("*.json")):
        schedules = load_schedules(file)
        accepted += [schedule for schedule in schedules if schedule.signature.model == model]
        num_skipped = sum(schedule.signature.model != model for schedule in schedules)
        if num_skipped:
            logger.info("%s: skipped %d schedules made for %s", file.name, num_skipped, schedules[0].signature.model)
    return ScheduleRegistry(accepted)
