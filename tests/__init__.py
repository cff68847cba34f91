"""The test suite.

Its results do not depend on the caller's environment. Variables that could change them are removed here, before any
library is imported, since some libraries read them only then. Programs that tests start inherit the result.
"""

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUR_PREFIXES = ("FLUX2_", "GENERATOR_", "TEXT_ENCODER_", "OTEL_", "LOG_", "SCHEDULES_DIR", "MODEL", "REVISION")
"""Prefixes of the settings, and of common names that must not become settings."""
PREFIXES = (*OUR_PREFIXES, "HF_", "HUGGING", "TRANSFORMERS_", "DIFFUSERS_")
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
"""Tests reach only services on this machine."""
TERMINAL = ("NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "PY_COLORS", "COLUMNS", "LINES", "GITHUB_ACTIONS")
"""Variables that change the output format of rich and typer."""


NOWHERE = "http://127.0.0.1:9"
"""Replaces the hub's address. Offline mode would also keep the hub's client from this project's services."""


def clean_environment() -> None:
    """Remove variables that could change a test's outcome; set those that keep it on this machine and in this tree."""
    names = {*PROXIES, *TERMINAL}
    for name in list(os.environ):
        if name.upper() in names or name.startswith(PREFIXES):
            del os.environ[name]
    os.environ |= {"HF_ENDPOINT": NOWHERE, "PYTHONPATH": str(ROOT)}
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of two processes would wait for each other, spinning


clean_environment()
