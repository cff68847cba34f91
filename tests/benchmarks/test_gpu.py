"""All benchmarks for a GPU in one command; here on a CPU at the tiny size."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.gpu import NEEDED, PARTS, ROOT, WANTED, Part, run_all, run_part


@pytest.mark.slow
def test_every_part_at_the_tiny_size(tmp_path: Path) -> None:
    """Without a GPU the command benchmarks steps and images at the tiny size, and writes their JSON and a log."""
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path), "--only", "latency", "trace"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads(ended.stdout.splitlines()[-1])
    assert [entry["part"] for entry in report["parts"]] == ["latency", "trace"]
    latency = json.loads((tmp_path / "latency.json").read_text(encoding="utf-8"))
    assert {"card", "steps", "pictures", "left_out", "weights"} <= latency.keys()
    assert {row["profile"] for row in latency["pictures"]} == {"exact", "fast"}
    assert any("fp8" in row["reason"] for row in latency["left_out"]), "unsupported profiles are reported"
    trace = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))
    assert [step["is_computed"] for step in trace["steps"]] == [True, False]
    assert (tmp_path / "log.txt").read_text(encoding="utf-8").count("====") == 2


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Part]:
    """Creates a benchmark of a few lines with ``so_far``, the file for its results."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    monkeypatch.setattr(gpu, "ROOT", tmp_path)

    def make(source: str) -> Part:
        start = "import sys, time\nfrom pathlib import Path\nso_far = Path(sys.argv[sys.argv.index('--so-far') + 1])\n"
        (tmp_path / "benchmarks" / "made_up.py").write_text(start + source)
        return Part("made_up", "made_up", (), (), 30)

    return make


def test_results_of_a_part_are_one_line(part: Callable[[str], Part], tmp_path: Path) -> None:
    """A successful part prints its results in one line, and no results of an earlier run."""
    (tmp_path / "made_up.json").write_text('{"old": 1}')
    report = run_part(part("so_far.write_text('{\\n\"rows\": [1, 2]\\n}')"), (), 30, tmp_path)
    assert "failed" not in report
    assert (tmp_path / "made_up.json").read_text() == '{"rows": [1, 2]}\n'


def test_a_failed_part_is_reported(part: Callable[[str], Part], tmp_path: Path) -> None:
    """A failed part has its reason in the report and its output in the log."""
    (tmp_path / "made_up.json").write_text('{"old": 1}')
    report = run_part(part("sys.exit('no such thing')"), (), 30, tmp_path)
    assert report["failed"] == "exit status 1: no such thing"
    assert "no such thing" in (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert not (tmp_path / "made_up.json").exists()


def test_a_part_that_exceeds_its_limit_is_stopped(part: Callable[[str], Part], tmp_path: Path) -> None:
    """At its limit a part is stopped; its results so far are kept, with the reason."""
    report = run_part(part("so_far.write_text('{\"rows\": [1]}')\ntime.sleep(60)"), (), 3, tmp_path)
    assert "stopped after 3 s" in report["failed"]
    assert json.loads((tmp_path / "made_up.json").read_text()) == {"rows": [1], "partial": "stopped after 3 s"}


def test_unused_time_is_available_to_later_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A part may use the time that earlier parts left, but not the time that later ones need."""
    limits = []

    def note(_part: Part, _options: tuple[str, ...], limit_s: float, _out: Path) -> dict[str, Any]:
        limits.append(round(limit_s))
        return {"part": "", "seconds": 0.0}

    monkeypatch.setattr(gpu, "run_part", note)
    monkeypatch.setattr(
        gpu, "PARTS", (Part("a", "a", (), (), 100), Part("b", "b", (), (), 50), Part("c", "c", (), (), 20))
    )
    run_all(["a", "b", "c"], 170, tmp_path, is_smoke=False)
    assert limits == [100, 150, 170]


def imported_packages(module: str, seen: set[str]) -> Iterator[str]:
    """The third-party packages that a module imports, directly or through this project's modules."""
    file = ROOT / f"{module.replace('.', '/')}.py"
    file = file if file.exists() else ROOT / module.replace(".", "/") / "__init__.py"
    if module in seen or not file.exists():
        return
    seen.add(module)
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            package = name.partition(".")[0]
            if (ROOT / package).is_dir():
                yield from imported_packages(name, seen)
            elif package not in sys.stdlib_module_names:
                yield package


def test_required_packages_are_checked() -> None:
    """The command checks for every package that the parts import in addition to PyTorch and its dependencies."""
    seen: set[str] = set()
    imported = {package for part in PARTS for package in imported_packages(f"benchmarks.{part.module}", seen)}
    assert "generator_service.app" in seen
    assert imported - {"torch", "numpy", "transformers", "huggingface_hub", "starlette", "pydantic_core"} <= {
        *NEEDED,
        *WANTED,
    }


def test_all_parts_fit_into_ten_minutes() -> None:
    """Even if every part runs to its limit, the command ends within ten minutes."""
    assert sum(part.limit_s for part in PARTS) <= 570


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_parts_are_benchmarks(part: Part) -> None:
    """Every part is a module of ``benchmarks``."""
    assert find_spec(f"benchmarks.{part.module}")
