"""Calibration: the error of an edge, and resuming after an interruption."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from demo_model.services import WEIGHTS
from generator_service.cli.calibration import record
from generator_service.lemica import (
    PREDICTORS,
    Calibration,
    CalibrationMismatch,
    ErrorGraph,
    Fitted,
    Linear,
    Predictor,
    Reuse,
    Schedule,
    Signature,
    num_forwards,
    schedule_for,
    with_fitted_predictor,
)
from generator_service.lemica.calibration.measure import edges_of
from generator_service.pipelines.flux2 import Flux2Model
from generator_service.pipelines.params import Params
from tests.conftest import Times

STEPS = 8
SIGNATURE = Signature("demo", STEPS)


def request(model: Flux2Model, seed: int, schedule: Schedule | None = None) -> Params:
    """A small image of a random embedding."""
    embeddings = torch.randn(1, 32, model.info.embedding_width, generator=torch.Generator().manual_seed(seed))
    return Params(embeddings, 64, 64, 4.0, seed, schedule or schedule_for("none", STEPS))


def calibration(model: Flux2Model, predictor: Predictor, num_samples: int = 2) -> Calibration:
    runs = [record(model, request(model, seed), predictor.feature) for seed in range(num_samples)]
    return Calibration(model.components.transformer, runs, predictor)


@pytest.mark.parametrize("predictor", [Reuse(), PREDICTORS["velocity"]], ids=lambda p: p.name)
@pytest.mark.parametrize("edge", [(0, 2), (2, 5), (3, 7), (5, 8), (0, 8)])
def test_the_error_of_an_edge_is_that_of_skipping_it_alone(
    demo: Flux2Model, predictor: Predictor, edge: tuple[int, int]
) -> None:
    """An edge's error is that of the image whose schedule skips only the steps inside the edge."""
    if predictor.feature == "velocity":
        predictor = Linear("held", feature="velocity", damping=0.0)
    graph = calibration(demo, predictor).measure(SIGNATURE, 8)
    steps = (*range(edge[0] + 1), *range(edge[1], STEPS))
    schedule = Schedule("one skip", STEPS, steps, "test", SIGNATURE, predictor)
    for seed, error in enumerate(graph.samples[edge]):
        cached = demo.generate(request(demo, seed, schedule)).latents
        full = demo.generate(request(demo, seed)).latents
        assert (cached - full).abs().mean().item() == pytest.approx(error, rel=1e-3, abs=1e-6)


def test_the_error_of_a_schedule_is_that_of_its_image(demo: Flux2Model) -> None:
    """The error of a whole schedule, with any predictor, is that of the image generated with it."""
    for predictor in (Reuse(), Linear(), Linear("velocity", feature="velocity")):
        schedule = Schedule("test", STEPS, (0, 1, 3, 6), "test", SIGNATURE, predictor)
        for seed, error in enumerate(calibration(demo, predictor).errors_of_schedule(schedule)):
            cached = demo.generate(request(demo, seed, schedule)).latents
            full = demo.generate(request(demo, seed)).latents
            assert (cached - full).abs().mean().item() == pytest.approx(error, rel=1e-3)


def test_every_edge_within_the_cap_is_measured(demo: Flux2Model) -> None:
    """Every edge that skips at least one step, up to the cap, gets one error for each sample."""
    graph = calibration(demo, Reuse()).measure(SIGNATURE, 3)
    wanted = {(i, j) for i, j in itertools.combinations(range(STEPS + 1), 2) if 2 <= j - i <= 3}
    assert set(graph.errors) == set(graph.samples) == wanted
    assert all(len(errors) == 2 for errors in graph.samples.values())
    assert all(graph.errors[edge] == sum(graph.samples[edge]) / 2 for edge in wanted)


def test_runs_can_be_stored_on_disk(demo: Flux2Model, tmp_path: Path) -> None:
    """Runs that are stored in files give the same errors, and no file is left behind."""
    runs = [record(demo, request(demo, seed), storage=tmp_path) for seed in range(2)]
    assert list(tmp_path.iterdir()) == []
    kept = Calibration(demo.components.transformer, runs, Reuse()).measure(SIGNATURE, 3)
    assert kept.samples == calibration(demo, Reuse()).measure(SIGNATURE, 3).samples


def test_the_approximate_error_is_that_where_the_skip_ends(demo: Flux2Model) -> None:
    """Approximate and exact errors agree for skips to the last step; other skips compare the latents at their end."""
    exact = calibration(demo, Reuse()).measure(SIGNATURE, 4)
    approximate = calibration(demo, Reuse()).measure(SIGNATURE, 4, is_exact=False)
    assert (exact.is_exact, approximate.is_exact) == (True, False)
    assert approximate.errors.keys() == exact.errors.keys()
    for (i, j), error in approximate.errors.items():
        assert (error == pytest.approx(exact.errors[i, j])) == (j == STEPS)


def test_a_checkpoint_of_the_other_method_is_refused(demo: Flux2Model, tmp_path: Path) -> None:
    """Approximate and exact errors are never mixed."""
    one = calibration(demo, Reuse())
    one.measure(SIGNATURE, 2, tmp_path / "graph.json", is_exact=False)
    with pytest.raises(CalibrationMismatch):
        one.measure(SIGNATURE, 2, tmp_path / "graph.json")
    assert not ErrorGraph.load(tmp_path / "graph.json").is_exact


@pytest.mark.parametrize(("num_steps", "cap", "count"), [(28, 6, 1505), (28, 10, 2307), (50, 6, 5410), (50, 10, 8940)])
def test_the_cost_is_estimated(num_steps: int, cap: int, count: int) -> None:
    """The number of transformer steps for one sample's calibration is known, in addition to its full run."""
    assert num_forwards(num_steps, cap) == count + num_steps
    assert edges_of(4, 2) == [(2, [(0, 2)]), (3, [(1, 3)]), (4, [(2, 4)])]


def test_fitted_weights_are_the_least_squares(demo: Flux2Model) -> None:
    """A fitted predictor is closer to the samples' features than linear extrapolation, which is closer than reuse."""
    runs = [record(demo, request(demo, seed)) for seed in range(2)]
    graph = Calibration(demo.components.transformer, runs, Reuse()).measure(SIGNATURE, 2)
    schedule = with_fitted_predictor(Schedule("test", STEPS, (0, 1, 2, 4), "test", SIGNATURE), graph)
    assert isinstance(schedule.predictor, Fitted)
    assert set(schedule.predictor.weights) == {3, 5, 6, 7}
    weights = torch.tensor(schedule.predictor.weights[6], dtype=torch.float64)
    past = torch.stack([torch.cat([run.features[s].flatten() for run in runs]).double() for s in (4, 2, 1)])
    target = torch.cat([run.features[6].flatten() for run in runs]).double()
    best = torch.linalg.lstsq(past.T, target.unsqueeze(1)).solution.flatten()
    actual, least = (((target - w @ past) ** 2).sum() for w in (weights, best))
    assert actual == pytest.approx(least.item(), rel=1e-3)


def test_samples_must_be_comparable(demo: Flux2Model) -> None:
    """Runs of different lengths are refused, and so is the checkpoint of another calibration."""
    first = record(demo, request(demo, 0))
    other = record(demo, request(demo, 0, schedule_for("none", 4)))
    with pytest.raises(CalibrationMismatch):
        Calibration(demo.components.transformer, [first, other], Reuse())


def test_the_checkpoint_of_another_calibration_is_refused(demo: Flux2Model, tmp_path: Path) -> None:
    """A calibration never resumes from measurements for other inputs."""
    one = calibration(demo, Reuse())
    one.measure(SIGNATURE, 2, tmp_path / "graph.json")
    with pytest.raises(CalibrationMismatch, match=r"graph\.json"):
        one.measure(Signature("other", STEPS), 2, tmp_path / "graph.json")


KILLED = """
import os, sys, torch
from pathlib import Path
from tests.conftest import local_model
from tests.generator_service.test_calibration import SIGNATURE, calibration
from generator_service.lemica import Linear
torch.set_num_threads(1)
model, folder = local_model(Path(sys.argv[1])), Path(sys.argv[2])
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        graph = calibration(model, Linear()).measure(SIGNATURE, 5, folder / "partial.json")
        graph.save(folder / line.strip())
        os._exit(0)
    print(child, flush=True)
    print("ended", os.waitpid(child, 0)[1], flush=True)
"""


def test_a_killed_calibration_resumes(tmp_path: Path, times: Times) -> None:
    """A calibration that is killed at random moments and restarted gives the same graph as an uninterrupted one."""
    rng = random.Random(0)
    folder = Path(__file__).parents[2]
    command = [sys.executable, "-c", KILLED, str(WEIGHTS), str(tmp_path)]
    with subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def run(name: str, kill_after_s: float | None) -> int:
            """Start a calibration, kill it, and return its exit status."""
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(f"{name}\n")
            process.stdin.flush()
            child = int(process.stdout.readline())
            if kill_after_s is not None:
                time.sleep(kill_after_s)
                with suppress(ProcessLookupError):  # it had already finished
                    os.kill(child, signal.SIGKILL)
            return int(process.stdout.readline().split()[1])

        assert process.stdout.readline() == "ready\n"
        began = time.monotonic()
        assert run("whole.json", None) == 0
        seconds = time.monotonic() - began
        num_kills = 0
        while num_kills < times(4, 200):
            (tmp_path / "partial.json").unlink(missing_ok=True)
            while run("resumed.json", rng.uniform(0, 0.9 * seconds)) == signal.SIGKILL:
                num_kills += 1
            assert ErrorGraph.load(tmp_path / "resumed.json") == ErrorGraph.load(tmp_path / "whole.json")
        process.stdin.close()
