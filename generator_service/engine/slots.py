"""What the queue holds: slots of generations, and their images."""

import asyncio
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from generator_service.engine.admission import Permit
from generator_service.engine.generation import Generation
from generator_service.pipelines.params import Params

Image = TypeVar("Image")


@dataclass(eq=False)
class Work(Generic[Image]):
    """An image for the device."""

    generation: Generation
    params: Params
    index: int | None
    """Index in its generation; None for a reference without a cache, which is not returned to the client."""
    result: "asyncio.Future[Image]"
    added: float
    started: float | None = None
    expected_s: float | None = None
    """Time of its run as estimated when the run began, in seconds."""

    @property
    def queue_s(self) -> float:
        """Time it waited for the device, in seconds."""
        return 0.0 if self.started is None else self.started - self.added

    def finish(self, result: Image | Exception) -> None:
        """Set the result, unless it was cancelled."""
        if self.result.done():
            return
        if isinstance(result, Exception):
            self.result.set_exception(result)
        else:
            self.result.set_result(result)


@dataclass(eq=False)
class Slot(Generic[Image]):
    """The place of a generation in the queue."""

    permit: Permit
    generation: Generation
    ready: list[Work[Image]] = field(default_factory=list)
    has_begun: bool = False

    @property
    def is_encoding(self) -> bool:
        """Whether its prompt is not embedded yet."""
        return not self.ready and not self.has_begun
