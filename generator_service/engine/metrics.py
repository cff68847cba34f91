"""The generator's Prometheus metrics: steps, images, and the quality of sampled images."""

from prometheus_client import Counter, Histogram

from flux2_shared.observability.metrics import DURATION_BUCKETS_S, Metrics

PSNR_BUCKETS_DB = (10, 15, 20, 25, 30, 35, 40, 50, 60, 80, 120)
SSIM_BUCKETS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999, 1)


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
