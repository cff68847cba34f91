"""Calibrated schedules, found by what they were made for. No torch here."""

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
"""Calibrated schedules that come with the product."""


class ScheduleRegistry:
    """Schedules of one model. What does not match a run is never used for it."""

    def __init__(self, schedules: Iterable[Schedule] = ()) -> None:
        self.schedules = tuple(schedules)

    def has(self, cache: str | int) -> bool:
        """Whether ``cache`` can be asked for at all, for some request."""
        if isinstance(cache, int):
            return cache >= 1
        return cache in ("none", *PUBLISHED) or any(schedule.name == cache for schedule in self.schedules)

    def find(self, cache: str | int, wanted: Signature) -> Schedule:
        """The schedule that a request's ``cache`` asks for.

        Args:
            cache: ``none``, a published or calibrated schedule's name, or how many steps are computed.
            wanted: what the request is.

        Returns:
            A calibrated schedule where one was made for just this; else the published list, carried over if need be.

        Raises:
            ScheduleMismatch: there is no such schedule, or it was made for something else; the text says for what.
        """
        fitting = self._fitting(wanted)
        num_steps = wanted.num_steps
        num_computed = published_size(cache, num_steps) if isinstance(cache, str) and cache in PUBLISHED else cache
        for schedule in fitting:
            if num_computed in (schedule.num_computed, schedule.name):
                return replace(schedule, name=str(cache)) if isinstance(cache, str) else schedule
        for schedule in self.schedules:
            if schedule.name == cache and cache not in PUBLISHED:
                raise ScheduleMismatch(f"schedule {cache!r} was {schedule.signature.mismatch(wanted)}")
        return schedule_for(cache, num_steps)

    def cheapest_within(self, max_error: float, wanted: Signature) -> Schedule:
        """The calibrated schedule with the fewest computed steps, none of whose errors exceeds ``max_error``.

        Raises:
            ScheduleMismatch: nothing was calibrated for such a request.
        """
        fitting = self._fitting(wanted)
        if not fitting:
            raise ScheduleMismatch(f"max_error needs a calibrated schedule, and there is none for {wanted}")
        good = [s for s in fitting if s.max_error is not None and s.max_error <= max_error]
        return min(good, key=lambda s: s.num_computed) if good else schedule_for("none", wanted.num_steps)

    def _fitting(self, wanted: Signature) -> list[Schedule]:
        return [schedule for schedule in self.schedules if schedule.signature.mismatch(wanted) is None]


def load_registry(folders: Iterable[Path], model: str) -> ScheduleRegistry:
    """Every schedule below ``folders`` that was made for ``model``; what is refused is logged with the reason.

    Args:
        folders: where ``*.json`` files of schedules lie.
        model: the model's fingerprint, as ``Signature.model`` has it.

    Raises:
        ScheduleMismatch: a file holds no schedules.
    """
    accepted: list[Schedule] = []
    for file in sorted(file for folder in folders for file in folder.glob("*.json")):
        found = load_schedules(file)
        accepted += [schedule for schedule in found if schedule.signature.model == model]
        refused = sum(schedule.signature.model != model for schedule in found)
        if refused:
            logger.info("%s: %d schedules refused: made for %s", file.name, refused, found[0].signature.model)
    return ScheduleRegistry(accepted)
