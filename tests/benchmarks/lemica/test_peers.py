"""The comparison with other caches, at equal computed steps."""

import argparse
from collections.abc import Callable

import pytest

from benchmarks.architectures import TINY
from benchmarks.generator.synthetic import Source, pipeline_of
from benchmarks.lemica.caches import Peer, eager_mag_cache, even_taylor_seer, fixed_mask
from benchmarks.lemica.peers import PLAIN, Comparison, Row, compared
from benchmarks.report.stopwatch import Stopwatch, Summary


def row(method: str, num_computed: int, seconds: float, profile: str = "") -> Row:
    """A method that was timed once."""
    return Row(method, num_computed, Summary.of([seconds]), profile)


def test_ours_is_compared_at_equal_computed_steps() -> None:
    """A cache is compared with our run of as many computed steps; without one there is no ratio."""
    rows = [
        row("diffusers", 20, 10.0),
        row("a cache", 8, 6.0),
        row("another", 9, 7.0),
        row("ours, fast", 8, 4.0, "fast"),
        row("ours, fast", 20, 8.0, "fast"),
    ]
    report = {entry["way"]: entry for entry in compared(rows, has_seconds=False)[:3]}
    assert report["a cache"]["ours_is_faster_by"] == {"fast": 1.5}
    assert report["another"]["ours_is_faster_by"] == {}
    assert report["diffusers"]["ours_is_faster_by"] == {"fast": 1.25}
    assert report["a cache"]["speedup_over_diffusers"] == 10 / 6


def test_seconds_are_reported_only_for_a_gpu() -> None:
    """On a CPU the rows have only ratios; on a GPU they have seconds, too."""
    rows = [row("diffusers", 20, 10.0)]
    assert "seconds" not in compared(rows, has_seconds=False)[0]
    assert compared(rows, has_seconds=True)[0]["seconds"]["median"] == 10.0


def test_without_the_plain_pipeline_there_is_no_ratio() -> None:
    """If the plain pipeline failed, the other methods are still reported."""
    assert compared([row("a cache", 8, 6.0)], has_seconds=False)[0]["speedup_over_diffusers"] is None


def test_a_stopwatch_measures_at_least_once() -> None:
    """There is at least one round, and at most the configured number, depending on the time."""
    assert list(Stopwatch(0.0, 5).rounds()) == [0]
    assert list(Stopwatch(60.0, 3).rounds()) == [0, 1, 2]


def computed_by(peer: Peer, num_steps: int) -> int:
    """The number of steps that a cache computes on the tiny model, in its second image."""
    source = Source(TINY, device="cpu")
    with source.components() as parts:
        pipeline = pipeline_of(parts)
        count = peer.install(pipeline, peer.values[0])
        for _ in range(2):
            pipeline(
                prompt_embeds=source.embedding(), width=64, height=64, num_inference_steps=num_steps,
                output_type="latent",
            )  # fmt: skip
            computed = count()
    return computed


@pytest.mark.parametrize("make", [eager_mag_cache, even_taylor_seer])
def test_diffusers_caches_compute_about_as_many_steps(make: Callable[[int, int], Peer]) -> None:
    """Without a search diffusers' caches are configured to compute the given number of steps within one."""
    assert computed_by(make(8, 20), 20) in {7, 8, 9}


@pytest.mark.filterwarnings("default")
def test_cache_dit_computes_the_steps_of_its_mask() -> None:
    """cache-dit computes exactly the steps of the mask."""
    pytest.importorskip("cache_dit")  # part of the extra bench
    assert computed_by(fixed_mask({0, 1, 4, 7}, 10, has_taylor_seer=False), 10) == 4


def run_comparison(budget_s: float, on_update: Callable[[Comparison], None] = lambda _comparison: None) -> Comparison:
    """A comparison of 6 steps on the tiny model."""
    source = Source(TINY, device="cpu")
    args = argparse.Namespace(side=64, steps=6, computed=3, profiles=["exact"], repeats=1, budget_s=budget_s)
    comparison = Comparison(source, args, on_update)
    comparison.run()
    return comparison


@pytest.mark.filterwarnings("default")
def test_ours_runs_early_at_the_steps_of_every_cache() -> None:
    """Ours comes second, and each cache is compared with our run of as many computed steps."""
    seen: list[int] = []
    comparison = run_comparison(600, lambda comparison: seen.append(len(comparison.rows)))
    methods = list(dict.fromkeys(row.method for row in comparison.rows))
    assert methods[:2] == [PLAIN, "ours, exact"]
    caches = [entry for entry in compared(comparison.rows, has_seconds=False) if "Cache" in entry["way"]]
    assert len(caches) >= 1
    assert all(entry["ours_is_faster_by"] for entry in caches)
    assert set(range(1, len(comparison.rows) + 1)) <= set(seen), "each row is reported immediately"


@pytest.mark.filterwarnings("default")
def test_methods_that_do_not_fit_are_skipped() -> None:
    """Without time no method starts, and each is reported."""
    comparison = run_comparison(0)
    assert comparison.rows == []
    assert comparison.left_out[0] == f"{PLAIN}: no time"
