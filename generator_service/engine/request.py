"""A request for images, with every default filled in and every field checked."""

from dataclasses import dataclass, replace

from generator_service.engine.imaging import DEFAULT_QUALITY, ImageFormat
from generator_service.engine.latency import LatencyEstimate
from generator_service.lemica import Schedule
from generator_service.pipelines.params import Params


@dataclass(frozen=True)
class Request:
    """One image or several with consecutive seeds. It can be pickled: a Ray cluster sends it to a replica."""

    params: Params
    """Of the first image."""
    num_images: int = 1
    output_format: ImageFormat = "png"
    quality: int = DEFAULT_QUALITY
    """Of JPEG and WebP files, 0 to 100."""
    deadline_s: float | None = None
    """Within which the device must have begun."""
    preview_steps: tuple[int, ...] = ()
    """After which steps a preview is emitted."""
    is_upsampled: bool = False
    """Whether the prompt is rewritten before it is embedded."""
    compare: bool = False
    """Whether each image is also generated without a cache, to measure the difference."""
    is_followed: bool = False
    """Whether a client reads the progress events."""
    num_tokens: int = 0
    """Tokens of an image and its reference images."""
    latency: LatencyEstimate | None = None
    """Of one image, once anything is known about the device's speed."""

    def all_params(self) -> list[Params]:
        """Of each image: the seeds are consecutive."""
        return [replace(self.params, seed=self.params.seed + index) for index in range(self.num_images)]

    @property
    def estimate_s(self) -> float | None:
        """Estimated time of one image on the device, in seconds."""
        return self.seconds_left(self.params.schedule)

    @property
    def estimate_of_all_s(self) -> float | None:
        """Estimated time of all images on the device, those without a cache for ``compare`` included, in seconds."""
        if self.latency is None:
            return None
        schedules = [self.params.schedule]
        if self.compare and not self.params.is_uncached:
            schedules.append(self.params.uncached().schedule)
        return self.num_images * sum(self.latency.seconds_left(schedule) for schedule in schedules)

    def seconds_left(self, schedule: Schedule, step: int = 0) -> float | None:
        """Estimated time of an image from the beginning of ``step`` on, in seconds."""
        return None if self.latency is None else self.latency.seconds_left(schedule, step)

    def without_tensors(self) -> "Request":
        """The same without the embedding and the reference images, which are large."""
        return replace(self, params=self.params.without_tensors())
