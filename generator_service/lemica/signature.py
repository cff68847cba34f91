"""What a schedule or an error graph was made for. A schedule is never used for something else silently."""

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Signature:
    """The things that change which steps matter; None where it is not known, as for published lists.

    The noise schedule shifts with steps and image tokens, so both belong to it.
    """

    model: str
    """Its name, and for calibrated schedules the fingerprint of its transformer."""
    num_steps: int
    image_tokens: int | None = None
    guidance_scale: float | None = None
    task: str | None = None
    """``text-to-image`` or ``edit``."""
    dtype: str | None = None
    predictor: str | None = None
    libraries: str | None = None
    """Versions of torch and diffusers: told, not compared."""

    def mismatch(self, other: "Signature") -> str | None:
        """The first thing in which ``other`` differs from what is known here, in words; None if nothing does."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if field.name not in ("libraries", "predictor") and mine is not None and mine != theirs:
                return f"made for {field.name} {mine}, not {theirs}"
        return None

    def to_json(self) -> dict[str, Any]:
        """Only what is known."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        parts = [self.model, f"{self.num_steps} steps"]
        parts += [f"{self.image_tokens} tokens"] if self.image_tokens is not None else []
        parts += [f"guidance {self.guidance_scale:g}"] if self.guidance_scale is not None else []
        return ", ".join([*parts, *(part for part in (self.task, self.predictor, self.dtype) if part)])
