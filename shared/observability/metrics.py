"""Prometheus metrics. Each app has its own registry, so that several apps can run in one process."""

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

DURATION_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80)

PSNR_BUCKETS_DB = (10, 15, 20, 25, 30, 35, 40, 50, 60, 80, 120)
SSIM_BUCKETS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999, 1)


class Metrics:
    """The metrics of both services, in seconds and bytes. Prompts, seeds and users are never labels."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "flux2_requests_total", "Requests answered", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "flux2_stage_seconds", "Time in each stage", ["stage"], registry=self.registry, buckets=DURATION_BUCKETS_S
        )
        self.cache = Counter(
            "flux2_embedding_cache_total", "Embedding cache lookups", ["result"], registry=self.registry
        )
        self.queue_depth = Gauge("flux2_queue_depth", "Waiting and running requests", registry=self.registry)
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
        self.device_memory = Gauge(
            "flux2_device_memory_bytes", "Memory of the GPU, of all processes", ["kind"], registry=self.registry
        )
        self.steps = Counter("flux2_steps_total", "Denoising steps", ["kind"], registry=self.registry)

    def watch_memory(self, device: torch.device) -> None:
        """Export the GPU's used and total memory at every scrape; does nothing for a CPU."""
        if device.type != "cuda":
            return

        def used() -> float:
            free, total = torch.cuda.mem_get_info(device)
            return total - free

        self.device_memory.labels("used").set_function(used)
        self.device_memory.labels("total").set_function(lambda: torch.cuda.mem_get_info(device)[1])
