"""The overhead of the service compared with the bare pipeline."""

import argparse
import json
import os
import subprocess
import sys
from collections import namedtuple
from typing import Any

import psutil
import pytest

from benchmarks.serving.openmp import SETTINGS, openmp_settings, resolved
from benchmarks.serving.overhead import OtherPrograms
from tests.test_docs import ROOT


@pytest.fixture(autouse=True)
def without_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unset all variables of OpenMP."""
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)


def test_settings_are_names_or_variables() -> None:
    """A list of variables applies to the generator; the encoder has the settings of ``make serve``."""
    assert openmp_settings("defaults") == SETTINGS["defaults"]
    settings = resolved(openmp_settings("GOMP_SPINCOUNT=7,OMP_NUM_THREADS=2"))
    assert settings["generator_service"] == {"threads": 2, "wait_policy": "default", "spin_count": "7"}
    assert settings["text_encoder_service"]["threads"] == 1


@pytest.mark.parametrize("text", ["", "fast", "OMP_NUM_THREADS", "OMP_NUM_THREADS=", "PATH=/x", "OMP_NUM_THREADS=1,x"])
def test_other_settings_are_refused(text: str) -> None:
    """A setting that is neither a name nor a variable of OpenMP is refused before anything is started."""
    with pytest.raises(argparse.ArgumentTypeError):
        openmp_settings(text)


def test_the_effective_settings_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The record has the settings that the services really get."""
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert resolved(SETTINGS["serve"]) == {
        module: {"threads": 5, "wait_policy": "active", "spin_count": "default"}
        for module in ("text_encoder_service", "generator_service")
    }


Times = namedtuple("Times", ["user", "system", "idle", "iowait", "guest"])
"""The fields of psutil's CPU times on Linux."""


def test_the_time_of_other_programs_is_separated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time that is neither idle nor used by the measured processes since the last call belongs to other programs."""
    whole = iter([Times(10, 2, 100, 0, 0), Times(16, 4, 108, 4, 0), Times(24, 4, 108, 4, 0)])
    ours = iter([Times(1, 1, 0, 0, 0), Times(4, 2, 0, 0, 0), Times(12, 2, 0, 0, 0)])

    class Process:
        def __init__(self, pid: int) -> None:
            assert pid == 1

        def cpu_times(self) -> Any:
            return next(ours)

    monkeypatch.setattr(psutil, "cpu_times", lambda: next(whole))
    monkeypatch.setattr(psutil, "Process", Process)
    others = OtherPrograms([1])
    assert others.share() == pytest.approx((20 - 12 - 4) / 20)
    assert others.share() == 0


@pytest.mark.slow
def test_the_command_compares_settings() -> None:
    """A tiny run of real processes has a row for each setting and size, with the settings of the threads."""
    command = [sys.executable, "-m", "benchmarks.serving.overhead", "--steps", "2", "--turns", "1", "--images", "1"]
    command += ["--sides", "64", "--settings", "serve", "GOMP_SPINCOUNT=0"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=True)
    report = json.loads(result.stdout.splitlines()[-1])
    assert [row["settings"] for row in report["rows"]] == ["serve", "GOMP_SPINCOUNT=0"]
    assert [row["openmp"]["generator_service"]["spin_count"] for row in report["rows"]] == ["10000", "0"]
    assert all(row["ratio"] > 0 and 0 <= row["others_share"] <= 1 for row in report["rows"])
