"""The structure of the code: limits of size, packages of the wheel, and imports of the commands."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests import ROOT

PACKAGES = ("shared", "text_encoder_service", "generator_service", "flux2_ray", "demo_model", "benchmarks")
MODULES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
MAX_FILE, MAX_CLASS, MAX_FUNCTION = 300, 150, 40
"""The maximum number of lines, including docstrings."""
SETTINGS = ("generator_service.settings", "text_encoder_service.settings")
HEAVY = ("torch", "diffusers", "transformers", "numpy", "PIL", "httpx", "fastapi")
"""Packages that are slow to import."""


def too_long(file: Path) -> list[str]:
    """The definitions in ``file`` that exceed a limit."""
    text = file.read_text(encoding="utf-8")
    num_lines = len(text.splitlines())
    name = file.relative_to(ROOT)
    violations = [f"{name}: {num_lines} lines"] if num_lines > MAX_FILE else []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if num_lines > (MAX_CLASS if isinstance(node, ast.ClassDef) else MAX_FUNCTION):
            violations.append(f"{name}: {node.name} has {num_lines} lines")
    return violations


def test_files_classes_and_functions_are_short() -> None:
    """Files have at most 300 lines, classes 150, functions 40."""
    assert [violation for file in MODULES for violation in too_long(file)] == []


def test_top_level_packages_have_distinctive_names() -> None:
    """No top-level package of the wheel has a name that another project's folder is likely to have."""
    configuration = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    include = configuration["tool"]["setuptools"]["packages"]["find"]["include"]
    names = {pattern.rstrip("*") for pattern in include}
    assert names == {"flux2_shared", "text_encoder_service", "generator_service", "flux2_ray"}


@pytest.mark.parametrize(
    "module", ["generator_service.settings", "text_encoder_service.settings", "generator_service.cli.app"]
)
def test_a_service_starts_beside_folders_of_the_same_names(tmp_path: Path, module: str) -> None:
    """A service starts in a folder that has its own ``shared`` and ``deploy``."""
    for name in ("shared", "deploy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('the package of another project')\n")
    subprocess.run([sys.executable, "-c", f"import {module}"], cwd=tmp_path, check=True)


def test_the_shared_package_is_imported_once() -> None:
    """It cannot be imported a second time by the name of its folder."""
    done = subprocess.run(
        [sys.executable, "-c", "import shared"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "import flux2_shared instead" in done.stderr


@pytest.mark.parametrize("command", ["", "weights", "doctor", "schedules", "generate", "calibrate"])
def test_commands_start_without_heavy_imports(command: str) -> None:
    """``--help`` of the commands imports no slow library."""
    program = (
        "import sys; from generator_service.cli.app import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    arguments = [sys.executable, "-c", program, *command.split(), "--help"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "Usage" in done.stdout


@pytest.mark.parametrize("module", SETTINGS)
def test_settings_are_read_without_torch(module: str) -> None:
    """Settings can be read and validated even if torch cannot be imported."""
    program = (
        f"import sys, {module}; print([name for name in ('torch', 'diffusers', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
