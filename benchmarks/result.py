"""What a benchmark tells: a JSON line at its end and, where it is wanted, a file with what it has so far."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from generator_service.lemica.files import write_json


class Result:
    """The findings of one run.

    Args:
        about: what they are of: the benchmark's name, its card, what was measured.
        so_far: a file that holds, whenever the run is stopped, what it had found.
    """

    def __init__(self, about: Mapping[str, Any], so_far: Path | None = None) -> None:
        self._about = about
        self._so_far = so_far

    def keep(self, found: Mapping[str, Any]) -> None:
        """All that was found until now."""
        if self._so_far is not None:
            write_json(self._so_far, {**self._about, **found})

    def tell(self, found: Mapping[str, Any]) -> None:
        """All that was found, as the last line."""
        self.keep(found)
        print(json.dumps({**self._about, **found}))


def add_so_far_option(parser: argparse.ArgumentParser) -> None:
    """The option ``--so-far``."""
    parser.add_argument("--so-far", type=Path, help="a file that always holds what was measured until then")
