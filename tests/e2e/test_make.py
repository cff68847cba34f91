"""The Makefile, as users without Python or without arguments see it."""

import os
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def make(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run make without the environment of another make, which would print ``make[1]: Entering directory``."""
    make = shutil.which("make")
    assert make is not None
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        [make, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_help_lists_every_target() -> None:
    """``make help`` and ``make`` print each target with its description."""
    targets = set(re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split())
    for result in (make(), make("help")):
        assert {line.split()[0] for line in result.stdout.splitlines()} == targets
        assert all(len(line.split()) > 1 for line in result.stdout.splitlines())


def test_a_missing_python_is_reported_in_one_line(tmp_path: Path) -> None:
    """The line names the missing command and the required version."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    result = make("demo", "PYTHON=no-such-python", folder=tmp_path)
    assert result.returncode != 0
    assert "flux2: no-such-python was not found; install Python 3.11 or newer" in result.stdout
    assert not (tmp_path / ".venv").exists()
