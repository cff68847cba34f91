"""Named OpenMP settings for benchmarks that start both services."""

import argparse
from collections.abc import Mapping
from typing import Any

import torch

from demo_model.services import MODULES, OPENMP, OpenMP, openmp_environment

SETTINGS: Mapping[str, OpenMP] = {
    "serve": OPENMP,
    "defaults": {},
    "passive": {module: {"OMP_WAIT_POLICY": "passive"} for module in MODULES},
}
HELP = (
    "OpenMP settings: serve (as `make serve`), defaults (of the library), passive,"
    " or variables for the generator only, such as GOMP_SPINCOUNT=1000,OMP_NUM_THREADS=2"
)


def openmp_settings(text: str) -> OpenMP:
    """Parse OpenMP settings of the command line.

    Raises:
        ArgumentTypeError: ``text`` is neither a name nor a list of variables.
    """
    if text in SETTINGS:
        return SETTINGS[text]
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(name.startswith(("OMP_", "GOMP_")) and value for name, _, value in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is neither {', '.join(SETTINGS)} nor OMP_...=VALUE,GOMP_...=VALUE")
    return {**OPENMP, "generator_service": {name: value for name, _, value in pairs}}


def resolved(openmp: OpenMP) -> dict[str, dict[str, Any]]:
    """Return threads, wait policy and spin count of each service, including this process's environment."""
    environments = {module: openmp_environment(openmp.get(module, {})) for module in MODULES}
    return {
        module: {
            "threads": int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())),
            "wait_policy": environment.get("OMP_WAIT_POLICY", "default"),
            "spin_count": environment.get("GOMP_SPINCOUNT", "default"),
        }
        for module, environment in environments.items()
    }
