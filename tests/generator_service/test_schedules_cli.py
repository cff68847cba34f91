"""``flux2 calibrate`` and ``flux2 schedules``."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from demo_model.services import WEIGHTS
from generator_service.cli import calibration
from generator_service.cli.app import app
from generator_service.cli.calibration import choose_storage
from generator_service.lemica import Calibration, ErrorGraph, Schedule, load_schedules
from tests.memory_errors import KINDS


def run(*arguments: object) -> Result:
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
    """A graph is measured and saved, planned for every budget, and its schedules are saved and listed."""
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
    """A budget, or a bound on the error, gives one schedule, which may have a name."""
    one = graph.parent / "one.json"
    assert run("schedules", "plan", graph, "--budget", 3, "--name", "night", "-o", one).exit_code == 0
    schedule = Schedule.load(one)
    assert (schedule.name, schedule.num_computed, schedule.predictor.name) == ("night", 3, "linear")
    assert run("schedules", "plan", graph, "--max-error", 1000, "--for", "worst", "-o", one).exit_code == 0
    assert Schedule.load(one).num_computed == 2


def test_plans_can_be_refined_on_whole_runs(graph: Path) -> None:
    """``refine`` measures whole runs, never increases the error, and saves the measurements."""
    saved = graph.parent / "refined.json"
    options = ("--model", WEIGHTS, "--prompts", graph.parent / "prompts.txt", "--size", "64x64", "--seeds", 1)
    result = run("schedules", "refine", graph, *options, "--budget", 2, "--budget", 3, "-o", saved)
    assert result.exit_code == 0, result.output
    schedules = load_schedules(saved)
    assert [schedule.num_computed for schedule in schedules] == [2, 3]
    assert all(0 < s.evidence["error"] <= s.evidence["planned_error"] for s in schedules)
    assert all(s.evidence["samples"] == 2 for s in schedules)


def test_a_graph_of_another_signature_is_not_refined(graph: Path) -> None:
    """The runs must match the graph's signature."""
    options = ("--model", WEIGHTS, "--prompts", graph.parent / "prompts.txt", "--size", "80x64", "--seeds", 1)
    result = run("schedules", "refine", graph, *options, "--budget", 2, "-o", graph.parent / "refined.json")
    assert result.exit_code == 1
    assert "made for image_tokens 16, not 20" in result.output
    assert not (graph.parent / "refined.json").exists()


def test_the_option_keep_is_validated(tmp_path: Path) -> None:
    """``--keep`` is a device or a folder; anything else is an error in one line."""
    (tmp_path / "prompts.txt").write_text("a red square")
    options = ("--model", WEIGHTS, "--prompts", tmp_path / "prompts.txt", "--steps", 4, "--size", "64x64")
    result = run("calibrate", *options, "--keep", "nowhere", "-o", tmp_path / "graph.json")
    assert result.exit_code == 1
    assert "flux2: --keep=nowhere: no such device is supported" in result.output
    assert run("calibrate", *options, "--keep", tmp_path, "--seeds", 1, "-o", tmp_path / "graph.json").exit_code == 0


@pytest.mark.parametrize("method", [(calibration, "record"), (Calibration, "measure")])
def test_too_little_memory_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: tuple[object, str]
) -> None:
    """If runs, or a batch, exceed the memory, the command ends with what to change."""
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
def test_runs_are_stored_where_they_fit(monkeypatch: pytest.MonkeyPatch, free: int, kept_on: str) -> None:
    """Runs stay on the GPU only if as much memory is free there for the computation."""
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (free, 1000))
    assert str(choose_storage(50, torch.device("cuda", 1))) == kept_on


def test_an_estimate_measures_nothing(tmp_path: Path) -> None:
    """``--estimate`` prints the number of transformer steps and their duration, and writes no file."""
    (tmp_path / "prompts.txt").write_text("a red square")
    options = ("--model", WEIGHTS, "--prompts", tmp_path / "prompts.txt", "--steps", 6, "--size", "64x64")
    result = run("calibrate", *options, "--estimate", "-o", tmp_path / "graph.json")
    assert result.exit_code == 0, result.output
    assert "2 samples, 52 transformer steps" in result.stdout
    assert not (tmp_path / "graph.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("schedules", "plan", "absent.json"), "absent.json is not an error graph"),
        (("schedules", "show", "absent.json"), "absent.json is not a file of schedules"),
        (("calibrate", "--prompts", "absent.txt"), "absent.txt"),
        (("calibrate", "--prompts", "absent.txt", "--predictor", "magic"), "--predictor must be one of"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    """An invalid file or option is an error in one line, with a nonzero status."""
    result = run(*arguments)
    assert result.exit_code != 0
    assert message in result.output
    assert "Traceback" not in result.output


def test_an_impossible_budget_names_the_range(graph: Path) -> None:
    """The error names the budgets that the graph supports."""
    result = run("schedules", "plan", graph, "--budget", 1)
    assert result.exit_code == 1
    assert "2 to 6 computed steps, not 1" in result.output
