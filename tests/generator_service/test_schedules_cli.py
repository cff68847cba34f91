"""``flux2 calibrate`` and ``flux2 schedules``."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from demo_model.services import WEIGHTS
from generator_service.cli.app import app
from generator_service.cli.calibration import choose_storage
from generator_service.lemica import Calibration, ErrorGraph, Schedule, load_schedules
from generator_service.pipelines.flux2 import Flux2Model
from tests.memory_errors import KINDS


def run(*arguments: object) -> Result:
    """The command with these arguments."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """A small graph, calibrated by the command."""
    (tmp_path / "prompts.txt").write_text("a small red circle in the center on a white background\n\na red square\n")
    options = ("--model", WEIGHTS, "--prompts", tmp_path / "prompts.txt", "--steps", 6, "--size", "64x64", "--seeds", 1)
    result = run("calibrate", *options, "--max-skip", 4, "-o", tmp_path / "graph.json")
    assert result.exit_code == 0, result.output
    return tmp_path / "graph.json"


def test_calibrate_plan_show(graph: Path) -> None:
    """A graph is measured and saved, planned for every budget, and the schedules saved, listed and drawn."""
    loaded = ErrorGraph.load(graph)
    assert loaded.signature is not None
    assert (loaded.signature.num_steps, loaded.signature.image_tokens, loaded.signature.predictor) == (6, 16, "linear")
    assert all(len(samples) == 2 for samples in loaded.samples.values())
    saved = graph.parent / "schedules" / "all.json"
    saved.parent.mkdir()
    planned = run("schedules", "plan", graph, "-o", saved)
    assert planned.exit_code == 0, planned.output
    assert [schedule.num_computed for schedule in load_schedules(saved)] == [2, 3, 4, 5]
    assert run("schedules", "show", saved).stdout.count("█") == 2 + 3 + 4 + 5
    assert "all.json" in run("schedules", "list", saved.parent).stdout
    assert [file.name for file in graph.parent.glob("*.unfinished")] == []


def test_one_schedule_can_be_planned_and_named(graph: Path) -> None:
    """A budget, or a bound on the errors, gives one schedule; so it may have a name."""
    one = graph.parent / "one.json"
    assert run("schedules", "plan", graph, "--budget", 3, "--name", "night", "-o", one).exit_code == 0
    schedule = Schedule.load(one)
    assert (schedule.name, schedule.num_computed, schedule.predictor.name) == ("night", 3, "linear")
    assert run("schedules", "plan", graph, "--max-error", 1000, "--for", "worst", "-o", one).exit_code == 0
    assert Schedule.load(one).num_computed == 2


def test_plans_can_be_refined_on_whole_runs(graph: Path) -> None:
    """``refine`` measures whole runs, never makes a plan worse, and saves what it measured."""
    saved = graph.parent / "refined.json"
    options = ("--model", WEIGHTS, "--prompts", graph.parent / "prompts.txt", "--size", "64x64", "--seeds", 1)
    result = run("schedules", "refine", graph, *options, "--budget", 2, "--budget", 3, "-o", saved)
    assert result.exit_code == 0, result.output
    found = load_schedules(saved)
    assert [schedule.num_computed for schedule in found] == [2, 3]
    assert all(0 < s.evidence["error"] <= s.evidence["planned_error"] for s in found)
    assert all(s.evidence["samples"] == 2 for s in found)


def test_a_graph_of_something_else_is_not_refined(graph: Path) -> None:
    """The runs must be what the graph was made for."""
    options = ("--model", WEIGHTS, "--prompts", graph.parent / "prompts.txt", "--size", "80x64", "--seeds", 1)
    result = run("schedules", "refine", graph, *options, "--budget", 2, "-o", graph.parent / "refined.json")
    assert result.exit_code == 1
    assert "made for image_tokens 16, not 20" in result.output
    assert not (graph.parent / "refined.json").exists()


def test_what_keeps_the_runs_is_checked(tmp_path: Path) -> None:
    """``--keep`` is a device or a folder; anything else is one line."""
    (tmp_path / "prompts.txt").write_text("a red square")
    options = ("--model", WEIGHTS, "--prompts", tmp_path / "prompts.txt", "--steps", 4, "--size", "64x64")
    result = run("calibrate", *options, "--keep", "nowhere", "-o", tmp_path / "graph.json")
    assert result.exit_code == 1
    assert "flux2: --keep=nowhere: no such device is supported" in result.output
    assert run("calibrate", *options, "--keep", tmp_path, "--seeds", 1, "-o", tmp_path / "graph.json").exit_code == 0


@pytest.mark.parametrize("method", [(Flux2Model, "record"), (Calibration, "measure")])
def test_too_little_memory_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: tuple[type, str]
) -> None:
    """Runs, or a batch beside them, that do not fit end the command with what to change."""
    (tmp_path / "prompts.txt").write_text("a red square")
    options = ("--model", WEIGHTS, "--prompts", tmp_path / "prompts.txt", "--steps", 4, "--size", "64x64", "--seeds", 1)

    def run_out(*_: object, **__: object) -> None:
        error = KINDS["cublas"]()
        raise error

    monkeypatch.setattr(*method, run_out)
    result = run("calibrate", *options, "-o", tmp_path / "graph.json")
    assert result.exit_code == 1
    assert "smaller --batch or --keep cpu" in result.output


@pytest.mark.parametrize(("free", "kept_on"), [(100, "cuda:1"), (99, "cpu")])
def test_runs_are_kept_where_there_is_room(monkeypatch: pytest.MonkeyPatch, free: int, kept_on: str) -> None:
    """Runs stay on the GPU only if as much is free there for what is computed with them."""
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (free, 1000))
    assert str(choose_storage(50, torch.device("cuda", 1))) == kept_on


def test_an_estimate_measures_nothing(tmp_path: Path) -> None:
    """``--estimate`` says how many transformer steps it would take and for how long, and writes no file."""
    (tmp_path / "prompts.txt").write_text("a red square")
    options = ("--model", WEIGHTS, "--prompts", tmp_path / "prompts.txt", "--steps", 6, "--size", "64x64")
    result = run("calibrate", *options, "--estimate", "-o", tmp_path / "graph.json")
    assert result.exit_code == 0, result.output
    assert "2 samples, 52 transformer steps" in result.stdout
    assert not (tmp_path / "graph.json").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("schedules", "plan", "absent.json"), "absent.json is not an error graph"),
        (("schedules", "show", "absent.json"), "absent.json is not a file of schedules"),
        (("calibrate", "--prompts", "absent.txt"), "absent.txt"),
        (("calibrate", "--prompts", "absent.txt", "--predictor", "magic"), "--predictor must be one of"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], told: str) -> None:
    """What cannot be read is said in a line, with a status that is not 0."""
    result = run(*arguments)
    assert result.exit_code != 0
    assert told in result.output
    assert "Traceback" not in result.output


def test_an_impossible_budget_names_the_range(graph: Path) -> None:
    """The error says which budgets the graph has."""
    result = run("schedules", "plan", graph, "--budget", 1)
    assert result.exit_code == 1
    assert "2 to 6 computed steps, not 1" in result.output
