"""Prometheus metrics. Each app has its own registry, so that several apps can run in one process."""

from collections.abc import Mapping

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector

DURATION_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 300, 600)


class Metrics:
    """The metrics of both services, in seconds and bytes. Prompts, seeds and users are never labels."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.build = Info("flux2_build", "The service's version and model", registry=self.registry)
        self.requests = Counter(
            "flux2_requests_total", "Requests that ended", ["route", "status", "code"], registry=self.registry
        )
        self.request_seconds = Histogram(
            "flux2_request_seconds",
            "Time from a request to the end of its response",
            ["route"],
            registry=self.registry,
            buckets=DURATION_BUCKETS_S,
        )
        self.seconds = Histogram(
            "flux2_stage_seconds", "Time in each stage", ["stage"], registry=self.registry, buckets=DURATION_BUCKETS_S
        )
        self.cache = Counter(
            "flux2_embedding_cache_total", "Embedding cache lookups", ["result"], registry=self.registry
        )
        self.queue_depth = Gauge("flux2_queue_depth", "Waiting and running requests", registry=self.registry)
        self.device_memory = Gauge(
            "flux2_device_memory_bytes", "Memory of the GPU, of all processes", ["kind"], registry=self.registry
        )

    def describe_build(self, labels: Mapping[str, str]) -> None:
        """Export constant labels, such as version and model."""
        self.build.info(dict(labels))

    def watch_memory(self, device: torch.device) -> None:
        """Export the GPU's used and total memory at every scrape; does nothing for a CPU."""
        if device.type != "cuda":
            return

        def used() -> float:
            free, total = torch.cuda.mem_get_info(device)
            return total - free

        self.device_memory.labels("used").set_function(used)
        self.device_memory.labels("total").set_function(lambda: torch.cuda.mem_get_info(device)[1])
