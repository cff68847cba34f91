"""Calibrated schedules: their files, and which request uses which schedule."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from generator_service.lemica import (
    PREDICTORS,
    Fitted,
    Linear,
    Predictor,
    Reuse,
    Schedule,
    ScheduleMismatch,
    ScheduleRegistry,
    Signature,
    load_registry,
    load_schedules,
    save_schedules,
)

SIGNATURE = Signature("transformer 12ab", 50, 64, 4.0, "text-to-image", "float32", "linear", "torch 1")
FAST = Schedule("15 computed", 50, (0, *range(36, 50)), "calibrated", SIGNATURE, Linear(), 0.02, {"psnr": 50.0})
ULTRA = Schedule("10 computed", 50, (0, *range(41, 50)), "calibrated", SIGNATURE, Linear(), 0.08)
NAMED = Schedule("night", 50, (0, 7), "calibrated", SIGNATURE, Reuse(), 0.5)
REGISTRY = ScheduleRegistry([NAMED, ULTRA, FAST])


@pytest.mark.parametrize("predictor", [*PREDICTORS.values(), Fitted({1: (1.0, -0.5)})], ids=lambda p: p.name)
def test_schedules_survive_their_file(tmp_path: Path, predictor: Predictor) -> None:
    """A loaded schedule equals the saved one, including predictor and evidence."""
    schedule = replace(FAST, predictor=predictor)
    schedule.save(tmp_path / "one.json")
    assert Schedule.load(tmp_path / "one.json") == schedule
    save_schedules([schedule, ULTRA], tmp_path / "two.json")
    assert load_schedules(tmp_path / "two.json") == [schedule, ULTRA]
    with pytest.raises(ScheduleMismatch, match="2 schedules"):
        Schedule.load(tmp_path / "two.json")


@pytest.mark.parametrize("content", ["", "[]", '{"format": "lemica-schedules/2"}', '{"format": "lemica-schedules/1"}'])
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    """A file without schedules is an error that names the file."""
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ScheduleMismatch, match=r"x\.json"):
        load_schedules(tmp_path / "x.json")


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    """A file of a later version is refused by its version, even if its schedules look valid."""
    FAST.save(tmp_path / "x.json")
    data = json.loads((tmp_path / "x.json").read_text())
    (tmp_path / "x.json").write_text(json.dumps(data | {"format": "lemica-schedules/2"}))
    with pytest.raises(ScheduleMismatch, match="has format 'lemica-schedules/2', not lemica-schedules/1"):
        load_schedules(tmp_path / "x.json")


@pytest.mark.parametrize("name", ["", "x" * 65, "nacht\u2013zug", "a;b", "two\nlines"])
def test_names_fit_into_a_header(name: str) -> None:
    """A schedule's name is short plain text, since it is sent in a header."""
    with pytest.raises(ScheduleMismatch, match="a schedule's name"):
        replace(FAST, name=name)


def test_a_damaged_schedule_is_refused(tmp_path: Path) -> None:
    """An invalid list of steps is refused when the file is read."""
    FAST.save(tmp_path / "x.json")
    data = json.loads((tmp_path / "x.json").read_text())
    data["schedules"][0]["computed_steps"] = [3, 2]
    (tmp_path / "x.json").write_text(json.dumps(data))
    with pytest.raises(ScheduleMismatch):
        load_schedules(tmp_path / "x.json")


def test_names_and_numbers_select_calibrated_schedules() -> None:
    """For the signature it was calibrated for, a calibrated schedule replaces the published names and the numbers."""
    assert REGISTRY.find("fast", SIGNATURE) == replace(FAST, name="fast")
    assert REGISTRY.find(10, SIGNATURE) == ULTRA
    assert REGISTRY.find("night", SIGNATURE) == NAMED
    assert REGISTRY.find("none", SIGNATURE).source == "all"
    assert REGISTRY.find("slow", SIGNATURE).source == "published"


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"num_steps": 28},
        {"image_tokens": 256},
        {"guidance_scale": 3.0},
        {"task": "edit"},
        {"dtype": "bfloat16"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_schedule_is_used_only_for_its_signature(change: dict[str, Any]) -> None:
    """Another model, length, size, guidance, task or dtype gets the published list; a custom name is refused."""
    requested = replace(SIGNATURE, **change)
    assert REGISTRY.find("fast", requested).source in ("published", "resampled")
    with pytest.raises(ScheduleMismatch, match=f"made for {next(iter(change))}"):
        REGISTRY.find("night", requested)
    with pytest.raises(ScheduleMismatch, match="calibrated"):
        REGISTRY.cheapest_within(1.0, requested)


@pytest.mark.parametrize("name", ["image_tokens", "guidance_scale", "task", "dtype"])
def test_unknown_fields_do_not_match(name: str) -> None:
    """A run with an unknown field in its signature does not use a calibrated schedule."""
    missing: dict[str, Any] = {name: None}
    requested = replace(SIGNATURE, **missing)
    assert REGISTRY.find("fast", requested).source == "published"
    with pytest.raises(ScheduleMismatch, match=f"made for {name}"):
        REGISTRY.find("night", requested)


def test_library_versions_do_not_matter() -> None:
    """Versions are recorded, not compared."""
    assert REGISTRY.find(10, replace(SIGNATURE, libraries="torch 2", predictor=None)) == ULTRA


@pytest.mark.parametrize(
    ("max_error", "expected"), [(1.0, "night"), (0.1, "10 computed"), (0.05, "15 computed"), (0.0, "none")]
)
def test_the_cheapest_within_an_error(max_error: float, expected: str) -> None:
    """``max_error`` selects the schedule with the fewest steps within that error, or computes every step."""
    assert REGISTRY.cheapest_within(max_error, SIGNATURE).name == expected


def test_a_folder_gives_the_schedules_of_its_model(tmp_path: Path) -> None:
    """Schedules of other models in the same folder are not loaded."""
    FAST.save(tmp_path / "a.json")
    replace(ULTRA, signature=replace(SIGNATURE, model="other")).save(tmp_path / "b.json")
    assert load_registry([tmp_path], SIGNATURE.model).schedules == (FAST,)
