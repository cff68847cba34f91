"""Output of a benchmark: JSON as the last line, and optionally a file with intermediate results."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from generator_service.lemica.files import write_json


class Result:
    """The output of one run.

    Args:
        about: name of the benchmark, system information and parameters.
        so_far: file for intermediate results, which remain if the run is stopped.
    """

    def __init__(self, about: Mapping[str, Any], so_far: Path | None = None) -> None:
        self._about = about
        self._so_far = so_far

    def save(self, report: Mapping[str, Any]) -> None:
        """Write the current report to the file of intermediate results."""
        if self._so_far is not None:
            write_json(self._so_far, {**self._about, **report})

    def finish(self, report: Mapping[str, Any]) -> None:
        """Save and print the final report."""
        self.save(report)
        print(json.dumps({**self._about, **report}))


def add_so_far_option(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--so-far``."""
    parser.add_argument("--so-far", type=Path, help="file for intermediate results")
