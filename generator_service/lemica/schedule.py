"""Schedules: which steps of a run are computed. No torch here.

The published lists are those of LeMiCa's authors for FLUX.2, 50 steps. For any other count a list is carried over in
relative position and says so in its ``source``.
"""

from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

PUBLISHED_STEPS = 50
PUBLISHED_FOR = "FLUX.2"
PUBLISHED: MappingProxyType[str, tuple[int, ...]] = MappingProxyType(
    {
        "slow": (*range(21), 27, 34, 41, 47, 49),
        "medium": (*range(15), 21, 28, 35, 42, 49),
        "fast": (0, 1, 2, 3, 4, 5, 8, 9, 15, 21, 27, 33, 39, 45, 49),
        "ultra": (0, 1, 4, 5, 9, 17, 25, 33, 41, 49),  # published for FLUX.2 [klein]
    }
)


class ScheduleMismatch(ValueError):
    """A schedule cannot be made, or was made for a run of another length."""


@dataclass(frozen=True)
class Schedule:
    """Which of ``num_steps`` denoising steps run the transformer; the others reuse what the last of them left.

    ``source`` says where the list comes from: ``all`` (no step is reused), ``published``, or ``resampled`` (carried
    over from a published list). ``signature`` says what it was made for.
    """

    name: str
    num_steps: int
    computed_steps: tuple[int, ...]
    source: str
    signature: str

    def __post_init__(self) -> None:
        steps = self.computed_steps
        if not steps or steps[0] != 0:
            raise ScheduleMismatch("a schedule starts with a computed step 0: there is nothing to reuse before it")
        if any(later <= earlier for earlier, later in pairwise(steps)):
            raise ScheduleMismatch("computed steps must increase")
        if steps[-1] >= self.num_steps:
            raise ScheduleMismatch(f"step {steps[-1]} lies outside a run of {self.num_steps} steps")

    def is_computed(self, step: int) -> bool:
        """Whether the transformer runs at ``step``."""
        return step in self.computed_steps

    @property
    def num_computed(self) -> int:
        """How often the transformer runs."""
        return len(self.computed_steps)

    def __str__(self) -> str:
        return f"{self.name}; source={self.source}; signature={self.signature}"


def schedule_for(cache: str | int, num_steps: int) -> Schedule:
    """The schedule that a request's ``cache`` asks for.

    Args:
        cache: ``none``, a published name, or the number of steps to compute.
        num_steps: length of the run.

    Raises:
        ScheduleMismatch: there is no such name, or the number does not lie in 1..``num_steps``.
    """
    if cache in ("none", num_steps):
        return Schedule("none", num_steps, tuple(range(num_steps)), "all", f"{num_steps} steps")
    if isinstance(cache, int):
        return _of_size(cache, num_steps)
    if cache not in PUBLISHED:
        known = ", ".join(("none", *PUBLISHED))
        raise ScheduleMismatch(f"there is no schedule {cache!r}: choose one of {known}, or a number of computed steps")
    steps = PUBLISHED[cache]
    if num_steps == PUBLISHED_STEPS:
        return Schedule(cache, num_steps, steps, "published", f"{PUBLISHED_FOR}, {PUBLISHED_STEPS} steps")
    return _resampled(cache, max(1, round(len(steps) * num_steps / PUBLISHED_STEPS)), num_steps, cache)


def _of_size(num_computed: int, num_steps: int) -> Schedule:
    """``num_computed`` steps, placed like the published list of the nearest share of computed steps."""
    if not 1 <= num_computed <= num_steps:
        raise ScheduleMismatch(f"cache: the number of computed steps must be 1 to {num_steps}, not {num_computed}")
    share = num_computed / num_steps

    def distance(name: str) -> float:
        return abs(len(PUBLISHED[name]) / PUBLISHED_STEPS - share)

    nearest = min(PUBLISHED, key=distance)
    if num_steps == PUBLISHED_STEPS and num_computed == len(PUBLISHED[nearest]):
        return schedule_for(nearest, num_steps)
    return _resampled(f"{num_computed} computed", num_computed, num_steps, nearest)


def _resampled(name: str, num_computed: int, num_steps: int, origin: str) -> Schedule:
    """The published list ``origin`` as ``num_computed`` of ``num_steps`` steps, in the same relative positions."""
    steps = resample(PUBLISHED[origin], PUBLISHED_STEPS, num_computed, num_steps)
    signature = f"{PUBLISHED_FOR}, {PUBLISHED_STEPS} steps ({origin})"
    return Schedule(name, num_steps, steps, "resampled", signature)


def resample(steps: tuple[int, ...], old_length: int, num_computed: int, new_length: int) -> tuple[int, ...]:
    """Carry a list of steps over to a run of another length, or to another number of steps.

    The list is read as a curve from index to relative position, sampled at ``num_computed`` even places and rounded;
    then steps that fell together are moved apart, which keeps the first at 0 and the last at the end.
    """
    placed = []
    for k in range(num_computed):
        place = k * (len(steps) - 1) / max(1, num_computed - 1)
        low = min(int(place), len(steps) - 2)
        position = steps[low] + (place - low) * (steps[low + 1] - steps[low])
        placed.append(round(position * (new_length - 1) / (old_length - 1)))
    for k in range(1, num_computed):
        placed[k] = max(placed[k], placed[k - 1] + 1)
    for k in reversed(range(num_computed)):
        placed[k] = min(placed[k], new_length - num_computed + k)
    return tuple(placed)
