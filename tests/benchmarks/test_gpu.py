"""Everything for a GPU, in one command; here on a CPU at the tiny size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import PARTS, ROOT, Part, last_json, run_part


@pytest.mark.slow
def test_every_part_at_the_tiny_size(tmp_path: Path) -> None:
    """Without a GPU the command runs the speed of steps and pictures tiny, and leaves their JSON and a log."""
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path), "--only", "latency", "trace"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    told = json.loads(ended.stdout.splitlines()[-1])
    assert [entry["part"] for entry in told["parts"]] == ["latency", "trace"]
    latency = json.loads((tmp_path / "latency.json").read_text(encoding="utf-8"))
    assert {"card", "steps", "pictures", "left_out", "weights"} <= latency.keys()
    assert {row["profile"] for row in latency["pictures"]} == {"exact", "fast"}
    assert any("fp8" in row["reason"] for row in latency["left_out"]), "what cannot be done here is told"
    trace = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))
    assert [step["is_computed"] for step in trace["steps"]] == [True, False]
    assert (tmp_path / "log.txt").read_text(encoding="utf-8").count("====") == 2


def test_a_part_that_fails_is_told(tmp_path: Path) -> None:
    """A part that ends badly leaves its reason, and its words in the log."""
    told = run_part(Part("no_such_benchmark", (), (), 30), (), 30, tmp_path)
    assert "exit status 1" in told["failed"]
    assert "no_such_benchmark" in (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert not (tmp_path / "no_such_benchmark.json").exists()


def test_a_part_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    """At its limit a part is stopped, and the reason says so."""
    told = run_part(Part("latency", (), (), 0.1), (), 0.1, tmp_path)
    assert "stopped after" in told["failed"]


def test_the_last_line_that_is_json() -> None:
    """What libraries print after the result, or like one, does not hide it."""
    assert last_json('noise\n{"a": 1}\n{not json\nbye\n') == {"a": 1}
    assert last_json("nothing\n") is None


def test_all_parts_fit_into_ten_minutes() -> None:
    """Even if every part ran to its limit, the command would end within ten minutes."""
    assert sum(part.limit_s for part in PARTS) <= 570


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_parts_are_benchmarks(part: Part) -> None:
    """Every part is a module of benchmarks."""
    assert (ROOT / "benchmarks" / f"{part.name}.py").exists() or part.name == "encoder"
