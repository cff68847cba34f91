"""Architectures that differ from those of the benchmarks."""

import json
import shutil
from pathlib import Path
from typing import Any


def resized(source: Path, folder: Path, **parts: dict[str, Any]) -> Path:
    """Write the model folder ``source`` to ``folder``; ``parts`` change the configurations of parts, one level deep."""
    shutil.copytree(source, folder)
    for part, changes in parts.items():
        file = folder / part / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        for name, value in changes.items():
            config[name] = config.get(name, {}) | value if isinstance(value, dict) else value
        file.write_text(json.dumps(config), encoding="utf-8")
    return folder
