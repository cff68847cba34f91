"""The alerts fire when they should, by Prometheus' own evaluation."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ALERTS = Path(__file__).parents[1] / "deploy/monitoring/alerts.yml"
GENERATOR = 'job="generator", instance="g"'
Series = dict[str, str]

pytestmark = pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian: prometheus)")


def counter(name: str, labels: str, values: str) -> Series:
    return {"series": f"{name}{{{GENERATOR}, {labels}}}", "values": values}


def histogram(name: str, values: dict[str, str]) -> list[Series]:
    """The buckets of a histogram by their upper limits."""
    return [counter(f"{name}_bucket", f'le="{limit}"', series) for limit, series in values.items()]


GOOD_QUALITY, BAD_QUALITY = {"20": "0+0x1500", "40": "0+0x1500", "80": "0+9x1500", "+Inf": "0+9x1500"}, {
    "20": "0+0x1440 0+9x60", "40": "0+0x1440 0+9x60", "80": "0+9x1500", "+Inf": "0+9x1500"
}  # fmt: skip
SLOW = {"80": "0+0x60", "160": "0+9x60", "+Inf": "0+9x60"}
FIRES: list[tuple[str, str, list[Series]]] = [
    ("InternalErrors", "20m", [counter("flux2_requests_total", 'code="internal_error", status="200"', "0+1x60")]),
    ("RefusingWork", "20m", [counter("flux2_requests_total", 'code="busy", status="429"', "0+1x60")]),
    ("GeneratorNotReady", "10m", [counter("flux2_requests_total", 'route="/health/ready", status="503"', "0+1x60")]),
    ("SlowGenerations", "40m", histogram("flux2_generation_seconds", SLOW)),
    ("QueueNotShrinking", "40m", [counter("flux2_queue_depth", 'x=""', "9x60")]),
    ("TextEncoderFailing", "20m", [
        counter("flux2_generations_total", 'status="failed", code="encoder_unavailable"', "0+1x60"),
        counter("flux2_generations_total", 'status="completed", code="ok"', "0+9x60"),
    ]),
    ("QualityFalling", "25h", histogram("flux2_quality_psnr_db", BAD_QUALITY)),
    ("GpuMemoryNearlyFull", "20m", [
        counter("flux2_device_memory_bytes", 'kind="used"', "99x60"),
        counter("flux2_device_memory_bytes", 'kind="total"', "100x60"),
    ]),
]  # fmt: skip
QUIET: list[Series] = [
    counter("flux2_requests_total", 'route="/generate", code="ok", status="200"', "0+9x1500"),
    counter("flux2_requests_total", 'route="/generate", code="invalid_request", status="422"', "0+9x1500"),
    counter("flux2_generations_total", 'status="completed", code="ok"', "0+99x1500"),
    counter("flux2_generations_total", 'status="failed", code="encoder_timeout"', "0+1x1500"),
    counter("flux2_queue_depth", 'x=""', "9 1 9 1" + " 9 1" * 700),
    counter("flux2_device_memory_bytes", 'kind="used"', "80x1500"),
    counter("flux2_device_memory_bytes", 'kind="total"', "100x1500"),
    {"series": f"up{{{GENERATOR}}}", "values": "1x1500"},
    {"series": 'up{job="text-encoder"}', "values": "1x1500"},
    *histogram("flux2_generation_seconds", {"20": "0+9x1500", "160": "0+9x1500", "+Inf": "0+9x1500"}),
    *histogram("flux2_quality_psnr_db", GOOD_QUALITY),
]


def evaluate(folder: Path, series: list[Series], **expected: list[dict[str, Any]]) -> None:
    """Let promtool evaluate the alerts over a series."""
    test = {"interval": "1m", "input_series": series, **expected}
    (folder / "test.yml").write_text(yaml.safe_dump({"rule_files": [str(ALERTS)], "tests": [test]}))
    command = [str(shutil.which("promtool")), "test", "rules", "test.yml"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr


def rules() -> dict[str, dict[str, Any]]:
    """All alerts by their name."""
    loaded = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))
    return {rule["alert"]: rule for group in loaded["groups"] for rule in group["rules"]}


def test_every_alert_is_tested() -> None:
    """An alert without a test here might never fire."""
    assert set(rules()) == {name for name, _, _ in FIRES} | {"ServiceDown"}


@pytest.mark.parametrize(("name", "at", "series"), FIRES, ids=[name for name, _, _ in FIRES])
def test_it_fires(name: str, at: str, series: list[Series], tmp_path: Path) -> None:
    """Each alert fires for the series that it is meant for."""
    firing = f'count(ALERTS{{alertname="{name}", alertstate="firing"}})'
    query = {"expr": firing, "eval_time": at, "exp_samples": [{"labels": "{}", "value": 1}]}
    evaluate(tmp_path, series, promql_expr_test=[query])


def test_a_missing_service_fires(tmp_path: Path) -> None:
    """If a service is not reachable, it is named."""
    annotations = {
        "summary": "No text-encoder is reachable.",
        "description": "docker compose ps; docker compose logs text-encoder. Loading the weights takes minutes.",
    }
    alert = {"exp_labels": {"job": "text-encoder", "severity": "critical"}, "exp_annotations": annotations}
    up = {"series": f"up{{{GENERATOR}}}", "values": "1x20"}
    down = {"series": 'up{job="text-encoder", instance="e"}', "values": "0x20"}
    for series in ([up, down], [up]):  # a container that was stopped has no target
        wanted = {"alertname": "ServiceDown", "eval_time": "10m", "exp_alerts": [alert]}
        evaluate(tmp_path, series, alert_rule_test=[wanted])


def test_normal_operation_is_quiet(tmp_path: Path) -> None:
    """Clients' mistakes, a short queue and a rare failure of the encoder alert nobody."""
    silence = [{"alertname": name, "eval_time": "24h", "exp_alerts": []} for name in rules()]
    evaluate(tmp_path, QUIET, alert_rule_test=silence)
