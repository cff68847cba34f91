"""Prometheus metrics. Each app has a registry of its own, so that two apps in one process do not meet."""

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

DURATION_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80)

PSNR_BUCKETS_DB = (10, 15, 20, 25, 30, 35, 40, 50, 60, 80, 120)
SSIM_BUCKETS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999, 1)


class Metrics:
    """What both services count. Seconds and bytes; no prompt, seed or user is ever a label."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "flux2_requests_total", "Requests answered", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "flux2_stage_seconds", "Time in each stage", ["stage"], registry=self.registry, buckets=DURATION_BUCKETS_S
        )
        self.cache = Counter("flux2_embedding_cache_total", "Embeddings looked up", ["result"], registry=self.registry)
        self.queue_depth = Gauge("flux2_queue_depth", "Work that waits or runs", registry=self.registry)
        self.psnr = Histogram(
            "flux2_quality_psnr_db",
            "Sampled pictures against those without a cache",
            registry=self.registry,
            buckets=PSNR_BUCKETS_DB,
        )
        self.ssim = Histogram(
            "flux2_quality_ssim",
            "Sampled pictures against those without a cache",
            registry=self.registry,
            buckets=SSIM_BUCKETS,
        )
        self.images = Histogram(
            "flux2_picture_seconds",
            "Drawing and decoding of one picture",
            ["mode"],
            registry=self.registry,
            buckets=DURATION_BUCKETS_S,
        )
        self.device_memory = Gauge(
            "flux2_device_memory_bytes", "Memory of the GPU, whoever uses it", ["kind"], registry=self.registry
        )
        self.steps = Counter("flux2_steps_total", "Denoising steps", ["kind"], registry=self.registry)

    def watch_memory(self, device: torch.device) -> None:
        """Tell at every scrape how full the GPU is; of a CPU there is nothing to tell."""
        if device.type != "cuda":
            return

        def used() -> float:
            free, total = torch.cuda.mem_get_info(device)
            return total - free

        self.device_memory.labels("used").set_function(used)
        self.device_memory.labels("total").set_function(lambda: torch.cuda.mem_get_info(device)[1])
