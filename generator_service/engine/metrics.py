"""The generator's Prometheus metrics: steps, images, and the quality of sampled images."""

import logging
from typing import TYPE_CHECKING

from prometheus_client import Counter, Gauge, Histogram

from flux2_shared.observability.metrics import DURATION_BUCKETS_S, Metrics

if TYPE_CHECKING:
    from generator_service.engine.generation import Generation, Timings

PSNR_BUCKETS_DB = (10, 15, 20, 25, 30, 35, 40, 50, 60, 80, 120)
SSIM_BUCKETS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999, 1)
ERROR_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.25, 0.5, 1, 2, 5)
logger = logging.getLogger("flux2")


class GeneratorMetrics(Metrics):
    """The metrics of both services, and those that only the generator has."""

    def __init__(self) -> None:
        super().__init__()
        self.psnr = Histogram(
            "flux2_quality_psnr_db",
            "PSNR of sampled images against the same images without a cache",
            registry=self.registry,
            buckets=PSNR_BUCKETS_DB,
        )
        self.ssim = Histogram(
            "flux2_quality_ssim",
            "SSIM of sampled images against the same images without a cache",
            registry=self.registry,
            buckets=SSIM_BUCKETS,
        )
        self.images = Histogram(
            "flux2_picture_seconds",
            "Denoising and decoding of one image",
            ["mode"],
            registry=self.registry,
            buckets=DURATION_BUCKETS_S,
        )
        self.steps = Counter("flux2_steps_total", "Denoising steps", ["kind"], registry=self.registry)
        self._add_outcomes()

    def _add_outcomes(self) -> None:
        self.generations = Counter(
            "flux2_generations_total", "Generations that ended", ["status", "code"], registry=self.registry
        )
        self.generation_seconds = Histogram(
            "flux2_generation_seconds",
            "Time of completed generations from their admission",
            registry=self.registry,
            buckets=DURATION_BUCKETS_S,
        )
        self.estimate_errors = Histogram(
            "flux2_estimate_error_ratio",
            "Difference of an image's estimated and measured time, relative to the measured one",
            registry=self.registry,
            buckets=ERROR_BUCKETS,
        )
        self.lora_loads = Counter("flux2_lora_loads_total", "LoRA adapters loaded", registry=self.registry)
        self.circuit_open = Gauge(
            "flux2_encoder_circuit_open", "Whether requests to the text encoder fail fast", registry=self.registry
        )
        self.jobs = Gauge("flux2_jobs", "Jobs that are kept", registry=self.registry)
        self.job_bytes = Gauge("flux2_job_bytes", "Size of the results of kept jobs", registry=self.registry)

    def record_image(self, timings: "Timings", mode: str) -> None:
        """Record the time of an image in each stage."""
        for stage in ("queue", "encode", "denoise", "decode"):
            self.seconds.labels(stage).observe(getattr(timings, f"{stage}_s"))
        seconds = timings.denoise_s + timings.decode_s
        self.images.labels(mode).observe(seconds)
        if timings.expected_s is not None and seconds > 0:
            self.estimate_errors.observe(abs(timings.expected_s - seconds) / seconds)

    def record_end(self, generation: "Generation") -> None:
        """Count and log how a generation ended, whether its client waited, followed a stream, or started a job."""
        code = "ok" if generation.error is None else generation.error.code
        self.generations.labels(generation.status, code).inc()
        if generation.status == "completed":
            self.generation_seconds.observe(generation.seconds)
        fields = {"status": str(generation.status), "code": code, "ms": round(1000 * generation.seconds)}
        logger.info("generation %s (%s) after %s ms", *fields.values(), extra={"fields": fields})
