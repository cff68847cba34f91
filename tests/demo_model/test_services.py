"""How ``make serve`` starts the services."""

import shutil
import subprocess
import sys

import psutil
import pytest

from demo_model.services import MODULES, OPENMP, openmp_environment

PARENT = """
import os
from demo_model.services import start
start(["sh", "-c", "echo $$; exec sleep 600"], dict(os.environ)).wait()
"""


@pytest.fixture(autouse=True)
def without_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unset all variables of OpenMP."""
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)


def test_each_service_has_its_defaults() -> None:
    """The text encoder has one thread, and the generator's threads spin for a limited time."""
    assert openmp_environment(OPENMP[MODULES[0]]) == {"OMP_NUM_THREADS": "1"}
    assert openmp_environment(OPENMP[MODULES[1]]).keys() == {"GOMP_SPINCOUNT"}


def test_the_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables that are set are not replaced."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert openmp_environment(OPENMP[MODULES[0]]) == {"OMP_NUM_THREADS": "3", "GOMP_SPINCOUNT": "7"}
    assert openmp_environment(OPENMP[MODULES[1]]) == {"OMP_NUM_THREADS": "3", "GOMP_SPINCOUNT": "7"}


def test_a_wait_policy_of_the_user_is_not_overruled(monkeypatch: pytest.MonkeyPatch) -> None:
    """In libgomp a spin count overrides the wait policy, so the default count is not set if there is a policy."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert openmp_environment(OPENMP[MODULES[1]]) == {"OMP_WAIT_POLICY": "active"}
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert openmp_environment(OPENMP[MODULES[1]]) == {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "7"}


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv of util-linux")
def test_services_end_with_a_killed_parent() -> None:
    """No service keeps running, and keeps its port, after the process that started it was killed."""
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        service = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        service.wait(timeout=60)
