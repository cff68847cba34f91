"""A request for images, with every default filled in and every field checked."""

from dataclasses import dataclass, replace

from generator_service.engine.imaging import DEFAULT_QUALITY, ImageFormat
from generator_service.engine.latency import LatencyEstimate
from generator_service.lemica import Schedule
from generator_service.pipelines.params import Params


@dataclass(frozen=True)
class Request:
    """A request for images with consecutive seeds. Picklable, because Ray sends it to a replica."""

    params: Params
    """Parameters of the first image."""
    num_images: int = 1
    output_format: ImageFormat = "png"
    quality: int = DEFAULT_QUALITY
    """Quality of JPEG and WebP files, 0 to 100."""
    deadline_s: float | None = None
    """Time within which all images must be finished, in seconds after the admission."""
    preview_steps: tuple[int, ...] = ()
    """Steps after which a preview is emitted."""
    is_upsampled: bool = False
    """Whether the prompt is rewritten before it is embedded."""
    compare: bool = False
    """Whether each image is also generated without a cache, to measure the difference."""
    is_followed: bool = False
    """Whether a client reads the progress events."""
    num_tokens: int = 0
    """Tokens of an image and its reference images."""
    latency: LatencyEstimate | None = None
    """Latency estimate of one image; None before the first measurement."""

    def all_params(self) -> list[Params]:
        """Return the parameters of each image; the seeds are consecutive."""
        return [replace(self.params, seed=self.params.seed + index) for index in range(self.num_images)]

    @property
    def estimate_s(self) -> float | None:
        """Estimated time of one image on the device, in seconds."""
        return self.seconds_left(self.params.schedule)

    @property
    def estimate_of_all_s(self) -> float | None:
        """Estimated time of all images on the device, including uncached ones for ``compare``, in seconds."""
        if self.latency is None:
            return None
        schedules = [self.params.schedule]
        if self.compare and not self.params.is_uncached:
            schedules.append(self.params.uncached().schedule)
        return self.num_images * sum(self.latency.seconds_left(schedule) for schedule in schedules)

    def seconds_left(self, schedule: Schedule, step: int = 0) -> float | None:
        """Return the estimated time of an image from the start of ``step``, in seconds; None if unknown."""
        return None if self.latency is None else self.latency.seconds_left(schedule, step)

    def without_tensors(self) -> "Request":
        """Return a copy without the embedding and the reference images, which are large."""
        return replace(self, params=self.params.without_tensors())
