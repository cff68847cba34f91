"""Prometheus metrics. Each app has a registry of its own, so that two apps in one process do not meet."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

DURATION_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80)


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
        self.steps = Counter("flux2_steps_total", "Denoising steps", ["kind"], registry=self.registry)
