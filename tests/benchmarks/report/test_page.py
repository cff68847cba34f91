"""The page of benchmark results."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report.page import PAGE, RESULTS, read_results, render, write

INFO = {
    "machine": {"gpu": "NVIDIA H200", "memory_gb": 150.1, "driver": "1.2"},
    "versions": {"torch": "9.9", "cuda": "99"},
    "commit": {"commit": "abc", "is_dirty": True},
    "date": "2099-01-02T03:04:05+00:00",
}
ONCE = {"median": 20.0, "min": 20.0, "max": 20.0, "count": 1}
LATENCY = {
    "benchmark": "latency",
    "card": INFO,
    "weights": "random weights, full size",
    "dtype": "torch.bfloat16",
    "performance": {"fast": "profile fast: compile"},
    "steps": [
        {
            "profile": "fast",
            "shape": "1024x1024",
            "prepare_s": 12.0,
            "computed_s": {"median": 0.4, "min": 0.39, "max": 0.41, "count": 3},
            "reused_s": {"median": 0.001, "min": 0.001, "max": 0.001, "count": 1},
            "fixed_s": 0.1,
            "decode_s": {"median": 0.05, "min": 0.05, "max": 0.05, "count": 1},
            "floor_s": 0.3,
            "peak_memory_gb": 66.6,
        }
    ],
    "pictures": [
        {
            "profile": "fast",
            "shape": "1024x1024",
            "mode": "none",
            "num_computed": 50,
            "num_steps": 50,
            "seconds": ONCE,
            "floor_s": 15.0,
            "decode_s": 0.05,
            "drawn": {"energy_j": 12000.0, "mean_w": 600.0, "mean_sm_mhz": 1800.0},
        }
    ],
    "left_out": [
        {"profile": "fast", "shape": "2048x2048", "mode": "none", "reason": "no time", "estimated_from_steps_s": 99.5}
    ],
}


def page_with(folder: Path, name: str, result: dict[str, Any]) -> str:
    """The page of one result."""
    (folder / name).write_text(json.dumps(result), encoding="utf-8")
    return render(read_results(folder))


def test_the_page_is_that_of_the_results() -> None:
    """The committed page equals the one that the script generates from the committed results."""
    assert PAGE.read_text(encoding="utf-8") == render(read_results(RESULTS))


def test_a_missing_gpu_result_is_reported(tmp_path: Path) -> None:
    """Without a GPU result the page says so, and names the command."""
    page = render(read_results(tmp_path))
    assert "**There is no result of a GPU yet**" in page
    assert "python -m benchmarks.gpu" in page
    assert "published, not measured by us | none" in page


def test_a_result_has_its_roofline_and_origin(tmp_path: Path) -> None:
    """An image's row has seconds, roofline, share of it and energy; machine, versions, commit and date are included."""
    page = page_with(tmp_path, "latency.json", LATENCY)
    assert "No result of a GPU" not in page
    assert "| fast | 1024x1024 | none | 50 of 50 | 20.00 s | 15.00 s | 75 % | 12000 J | 600 W, 1800 MHz |" in page
    assert "| fast | 1024x1024 | 400.00 ms (390.00 to 410.00; 3) | 0.30 s | 75 % | 1.00 ms |" in page
    for origin in ("NVIDIA H200", "torch 9.9", "abc with changes", "2099-01-02T03:04:05", "random weights, full size"):
        assert origin in page


def test_estimates_are_labeled(tmp_path: Path) -> None:
    """An image that was not measured is in a separate table, whose column is labeled as an estimate."""
    page = page_with(tmp_path, "latency.json", LATENCY)
    assert "| why | estimated from per-step |" in page
    assert "| fast | 2048x2048 | none | no time | 99.50 s |" in page


def test_peers_without_seconds_have_no_column_for_them(tmp_path: Path) -> None:
    """On a CPU only ratios are reported."""
    rows = [
        {"way": "diffusers", "num_computed": 20, "speedup_over_diffusers": 1.0, "ours_is_faster_by": {"fast": 1.2}},
        {"way": "ours, fast", "num_computed": 20, "speedup_over_diffusers": 1.2},
    ]
    result = {"benchmark": "peers", "card": INFO, "side": 64, "num_steps": 20, "rows": rows, "left_out": ["x: no time"]}
    page = page_with(tmp_path, "peers.json", result)
    assert "| method | computed steps | over diffusers | ours over it |" in page
    assert "| diffusers | 20 | 1.00 | fast 1.20 |" in page
    assert "- x: no time" in page


def test_other_results_have_their_sections(tmp_path: Path) -> None:
    """The loop's waits and kernels, a reused step, and the text encoder's results have sections, too."""
    step = {"is_computed": True, "wall_ms": 2.0, "busy_ms": 1.5, "num_kernels": 3, "top": [["gemm|x", 2, 1.25]]}
    trace_result = {"performance": "profile fast", "side": 64, "num_steps": 12, "waits": {"cudaStreamSynchronize": 1}}
    summary = {"median": 0.1, "min": 0.1, "max": 0.2, "count": 2}
    reuse = {
        "mode": "ultra",
        "computed_s": summary,
        "reused_s": summary,
        "reused_over_computed": 0.011,
        "exact_equals_diffusers": True,
    }
    page_with(tmp_path, "trace.json", {"benchmark": "trace", "card": INFO, **trace_result, "steps": [step]})
    page_with(
        tmp_path,
        "reuse.json",
        {"benchmark": "reuse", "card": INFO, "side": 64, **reuse, "compilations_after_warm_up": 0},
    )
    row = {
        "profile": "fast",
        "weights": "full",
        "batch": 8,
        "prompt_tokens": 100,
        "seconds": summary,
        "peak_gb": 40.123,
    }
    encoder: dict[str, Any] = {
        "rows": [row | {"prompts_per_s": 12.3456}],
        "difference": {"full, trimmed": 0.0123},
        "compile_s": {},
    }
    encoder |= {"left_out": ["int8"], "compilations_after_warm_up": 0}
    page = page_with(tmp_path, "encoder.json", {"benchmark": "encoder", "card": INFO, **encoder})
    assert "1 x cudaStreamSynchronize" in page
    assert "| `gemm/x` | 2 | 1.250 |" in page
    assert "| a reused step over a computed one | 1.10 % |" in page
    assert "| fast | full | 8 | 100 | 100.00 ms (100.00 to 200.00; 2) | 12.3 | 40.1 GB |" in page
    assert "| full, trimmed | 0.012 |  |" in page
    assert "- left out: int8" in page


LOAD: dict[str, Any] = {
    "benchmark": "load",
    "clients": 4,
    "batch": 1,
    "width": 64,
    "height": 32,
    "num_inference_steps": 50,
    "cache": "none",
    "seconds": 100.4,
    "statuses": {"200": 178, "429": 3},
    "pictures_per_s": 1.75,
    "ratio": 0.992,
    "ratios": [0.98, 0.992, 1.004],
    "device_idle_share": 0.005,
    "latency_s": {"p50": 2.26, "p95": 2.4, "p99": 2.43},
    "estimate_error_median": 0.009,
    "estimate_error_p90": 0.039,
    "memory_mb_half_and_end": [551, 552],
}


def test_incomplete_results_are_labeled(tmp_path: Path) -> None:
    """An interrupted result has its section with the measurements so far, and starts with the reason."""
    reuse = {"benchmark": "reuse", "card": INFO, "weights": "the demo model", "side": 512, "mode": "ultra"}
    reuse |= {"computed_s": ONCE, "reused_s": ONCE, "reused_over_computed": 0.01, "exact_equals_diffusers": True}
    page = page_with(tmp_path, "reuse.json", reuse | {"partial": "stopped after 60 s"})
    assert "It ended early (stopped after 60 s): not everything was measured." in page.replace("\n", " ")
    assert "| a reused step over a computed one | 1.00 % |" in page
    assert "compiled after the warm-up" not in page


def test_load_is_reported_as_a_ratio(tmp_path: Path) -> None:
    """Responses, the ratio to the bare loop, estimates and memory are reported; seconds only for a GPU."""
    page = page_with(tmp_path, "load.json", LOAD | {"card": INFO})
    assert "4 clients over HTTP for 100 s, each with one image after the other: 64x32, 50 steps, cache none." in page
    for row in (
        "178 x 200, 3 x 429",
        "0.992",
        "0.980, 0.992, 1.004",
        "0.9 %, 3.9 %",
        "551 MB, 552 MB",
        "0.5 %",
        "2.26 s, 2.40 s, 2.43 s",
    ):
        assert f"| {row} |" in page
    shared = {"batch": 4, "device_idle_share": None, "card": INFO | {"machine": {"cpu": "x"}}}
    page = page_with(tmp_path, "load.json", LOAD | shared)
    assert "after the other, of which 4 may share a run: 64x32" in page
    assert "2.26 s" not in page
    assert "device is idle" not in page


def test_the_settings_are_beside_each_ratio(tmp_path: Path) -> None:
    """OpenMP's threads, wait policy and spin count are reported for both services, without seconds."""
    openmp = {
        "text_encoder_service": {"threads": 1, "wait_policy": "default", "spin_count": "default"},
        "generator_service": {"threads": 2, "wait_policy": "default", "spin_count": "10000"},
    }
    row = {"settings": "serve", "openmp": openmp, "side": 256, "ratio": 1.0549, "others_share": 0.012}
    row |= {"service_s": 7.77, "bare_s": 7.36, "images": 21}
    page = page_with(tmp_path, "overhead.json", {"benchmark": "overhead", "card": INFO, "steps": 50, "rows": [row]})
    assert "| serve | threads 1, wait policy default, spin count default | threads 2, wait policy" in page
    assert "| 256x256 | 1.05 | 1.2 % |" in page
    assert "7.77" not in page
    page = page_with(tmp_path, "load.json", LOAD | {"card": INFO, "openmp": openmp})
    assert "| OpenMP of `generator_service` | threads 2, wait policy default, spin count 10000 |" in page


def test_every_latency_of_a_gpu_has_a_plot(tmp_path: Path) -> None:
    """The plot is saved where the page links to it."""
    pytest.importorskip("matplotlib")  # part of the extra bench
    (tmp_path / "results").mkdir()
    page_with(tmp_path / "results", "latency.json", LATENCY)
    write(tmp_path / "results", tmp_path / "page.md", tmp_path / "images")
    assert "(images/performance/latency.png)" in (tmp_path / "page.md").read_text(encoding="utf-8")
    assert (tmp_path / "images" / "latency.png").stat().st_size > 1000


def test_results_without_system_info_are_ignored(tmp_path: Path) -> None:
    """Files of older benchmarks are skipped."""
    (tmp_path / "load.json").write_text('{"machine": "x"}', encoding="utf-8")
    assert read_results(tmp_path) == []
