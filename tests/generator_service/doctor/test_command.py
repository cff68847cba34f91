"""``flux2 doctor`` as users start it, with the real libraries and the demo model."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from demo_model.services import WEIGHTS
from generator_service.doctor.check import Status
from tests.generator_service.doctor.hosts import install_packages

ROOT = WEIGHTS.parents[1]
TIMEOUT_S = 300
STATUSES = {status.value for status in Status}


def run(*options: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the command in its own process."""
    variables = {"GENERATOR_PORT": "0", "TEXT_ENCODER_PORT": "0", "TEXT_ENCODER_URL": "http://127.0.0.1:9"}
    path = os.pathsep.join(filter(None, [environ.pop("PYTHONPATH", None), str(ROOT)]))
    return subprocess.run(
        [sys.executable, "-c", "from generator_service.cli.app import app; app()", "doctor", *options],
        env={**os.environ, "FLUX2_MODEL": str(WEIGHTS), **variables, **environ, "PYTHONPATH": path},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def checks_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The checks in the command's JSON by name, after validation of its format."""
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert report["ok"] == (done.returncode == 0)
    assert all(check.keys() == {"name", "status", "detail", "fix"} for check in report["checks"])
    assert {check["status"] for check in report["checks"]} <= STATUSES
    return {check["name"]: check for check in report["checks"]}


def test_the_demo_model_starts_on_any_machine(tmp_path: Path) -> None:
    """With the demo model on a CPU the command succeeds and reports that the CPU is used."""
    done = run("--json", cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    checks = checks_of(done)
    assert done.returncode == 0, done.stdout
    assert "the CPU is used" in checks["generator device"]["detail"]
    assert checks["model"]["detail"].endswith("complete")
    for name in ("torch", "diffusers", "transformers", "packages", "transformer", "text_encoder"):
        assert checks[name]["status"] == "ok"


def test_several_defects_are_reported_separately(tmp_path: Path) -> None:
    """A broken torch, ``.env``, port, setting and model are each one failed check with a fix, without a traceback."""
    (tmp_path / ".env").write_bytes(b"\xff\xfe")
    (tmp_path / "model" / "vae").mkdir(parents=True)
    packages = install_packages(tmp_path / "packages", torch="raise OSError('libcudart.so.13: cannot open')")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.listen()
        done = run(
            "--json",
            cwd=tmp_path,
            PYTHONPATH=packages,
            FLUX2_MODEL=str(tmp_path / "model"),
            GENERATOR_PORT=str(server.getsockname()[1]),
            TEXT_ENCODER_MAX_BATCH="none",
        )
    checks = checks_of(done)
    assert done.returncode == 1
    failed = {name for name, check in checks.items() if check["status"] == "failed"}
    expected = {".env", "torch", "generator port", "TEXT_ENCODER_MAX_BATCH", "vae", "tokenizer", "transformer"}
    assert expected <= failed
    assert all(checks[name]["fix"] for name in failed)


@pytest.mark.parametrize("package", ["diffusers", "transformers"])
def test_a_missing_library_is_one_failed_check(tmp_path: Path, package: str) -> None:
    """Only the check of the missing library fails."""
    missing = "raise ModuleNotFoundError(f'No module named {__name__!r}')"
    torch = "__version__ = '2'\nfrom types import SimpleNamespace as N\nversion = N(cuda=None)\n"
    torch += "cuda = N(is_available=lambda: False, get_arch_list=lambda: [])"
    other = {"diffusers": "transformers", "transformers": "diffusers"}[package]
    stub = "__version__ = '1'\ndef __getattr__(name): return object"
    packages = install_packages(tmp_path / "packages", torch=torch, **{package: missing, other: stub})
    done = run(cwd=tmp_path, PYTHONPATH=packages)
    assert done.returncode == 1
    assert f"No module named '{package}'" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("1 check failed")


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    """``flux2 doctor --help`` imports no heavy library."""
    code = "import sys; from generator_service.cli.app import app; app(['doctor', '--help'], standalone_mode=False); "
    code += "print(sorted({'torch', 'diffusers', 'transformers', 'huggingface_hub'} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--json" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
