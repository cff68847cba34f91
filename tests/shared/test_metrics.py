"""The metrics of a device."""

import pytest
import torch
from prometheus_client import generate_latest

from flux2_shared.observability.metrics import Metrics


def test_a_gpus_memory_is_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The metric is the memory in use at the moment of the scrape, by all processes."""
    free = [60]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (free[0], 100))
    metrics = Metrics()
    metrics.watch_memory(torch.device("cuda"))
    assert b'flux2_device_memory_bytes{kind="used"} 40.0' in generate_latest(metrics.registry)
    free[0] = 10
    exposition = generate_latest(metrics.registry)
    assert b'flux2_device_memory_bytes{kind="used"} 90.0' in exposition
    assert b'flux2_device_memory_bytes{kind="total"} 100.0' in exposition


def test_a_cpu_has_no_memory_metric() -> None:
    """On a CPU the metric is absent, not zero."""
    metrics = Metrics()
    metrics.watch_memory(torch.device("cpu"))
    assert b"flux2_device_memory_bytes{" not in generate_latest(metrics.registry)
