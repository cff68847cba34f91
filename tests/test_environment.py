"""The suite itself does not depend on the caller's environment."""

import json
import os
import subprocess
import sys

import pytest

from tests import NOWHERE, ROOT

HOSTILE = {
    "GENERATOR_TOKEN": "secret",
    "FLUX2_MODEL": "nonexistent/model",
    "HF_HUB_OFFLINE": "1",
    "HF_ENDPOINT": "http://127.0.0.1:8",
    "HF_TOKEN": "hf_secret",
    "HTTP_PROXY": "http://127.0.0.1:9",
    "https_proxy": "http://127.0.0.1:9",
    "ALL_PROXY": "socks5://127.0.0.1:9",
    "NO_COLOR": "1",
    "FORCE_COLOR": "1",
    "COLUMNS": "20",
    "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",
}
PROGRAM = "import json, os, tests; print(json.dumps(dict(os.environ)))"


def test_the_callers_environment_is_not_used() -> None:
    """Settings, proxies, colors and widths are removed before a test runs; programs use the packages of this tree."""
    environment = {**os.environ, **HOSTILE, "PYTHONPATH": os.pathsep.join([str(ROOT), "/somewhere/else"])}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    remaining = json.loads(done.stdout)
    assert {name: remaining[name] for name in HOSTILE if name in remaining} == {"HF_ENDPOINT": NOWHERE}
    assert remaining["PYTHONPATH"] == str(ROOT)


@pytest.mark.parametrize("module", ["flux2_shared", "generator_service", "text_encoder_service", "demo_model"])
def test_programs_run_the_code_of_this_tree(module: str) -> None:
    """Programs that tests start use the code beside the tests, whatever else is installed."""
    command = [sys.executable, "-c", f"import {module}; print({module}.__file__)"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(ROOT))
