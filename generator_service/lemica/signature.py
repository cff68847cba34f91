"""The signature of a schedule or an error graph: the runs for which it is valid."""

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Signature:
    """Properties of a run that change which steps matter; None means any, as in published lists.

    The noise schedule is shifted by the number of steps and of image tokens, so both are part of the signature.
    """

    model: str
    """The model's name; for calibrated schedules with the fingerprint of its transformer."""
    num_steps: int
    image_tokens: int | None = None
    guidance_scale: float | None = None
    task: str | None = None
    """``text-to-image`` or ``edit``."""
    dtype: str | None = None
    predictor: str | None = None
    libraries: str | None = None
    """Versions of torch and diffusers; recorded, but not compared."""

    def mismatch(self, other: "Signature") -> str | None:
        """Describe the first field in which ``other`` differs, or return None if the signature matches it."""
        for field in fields(self):
            expected, actual = getattr(self, field.name), getattr(other, field.name)
            if field.name not in ("libraries", "predictor") and expected is not None and expected != actual:
                return f"made for {field.name} {expected}, not {actual}"
        return None

    def to_json(self) -> dict[str, Any]:
        """Return the fields that are not None."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        parts = [self.model, f"{self.num_steps} steps"]
        parts += [f"{self.image_tokens} tokens"] if self.image_tokens is not None else []
        parts += [f"guidance {self.guidance_scale:g}"] if self.guidance_scale is not None else []
        return ", ".join([*parts, *(part for part in (self.task, self.predictor, self.dtype) if part)])
