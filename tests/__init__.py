"""The test suite.

Its outcome does not depend on the environment of the person who runs it. What could change it is removed here, before
any library is imported: some read their variables only then. The programs that tests start inherit the result.
"""

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUR_PREFIXES = ("FLUX2_", "GENERATOR_", "TEXT_ENCODER_", "OTEL_", "LOG_", "SCHEDULES_DIR", "MODEL", "REVISION")
"""Of the settings, and of common names that must not become settings."""
PREFIXES = (*OUR_PREFIXES, "HF_", "HUGGING", "TRANSFORMERS_", "DIFFUSERS_")
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
"""Tests reach services on this machine alone."""
TERMINAL = ("NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "PY_COLORS", "COLUMNS", "LINES", "GITHUB_ACTIONS")
"""What rich and typer look at before they format text."""


NOWHERE = "http://127.0.0.1:9"
"""Instead of the hub, which no test reaches. Offline mode would also keep the hub's own client from our service."""


def clean_environment() -> None:
    """Remove what could change a test's outcome; set what keeps to this machine and to the packages of this tree."""
    names = {*PROXIES, *TERMINAL}
    for name in list(os.environ):
        if name.upper() in names or name.startswith(PREFIXES):
            del os.environ[name]
    os.environ |= {"HF_ENDPOINT": NOWHERE, "PYTHONPATH": str(ROOT)}


clean_environment()
