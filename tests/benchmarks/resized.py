"""Model folders with changed architectures."""

import json
import shutil
from pathlib import Path
from typing import Any


def resized(source: Path, folder: Path, **changed_configs: dict[str, Any]) -> Path:
    """Write the model folder ``source`` to ``folder`` with changed keys in its components' configurations."""
    shutil.copytree(source, folder)
    for component, changes in changed_configs.items():
        file = folder / component / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        for name, value in changes.items():
            config[name] = config.get(name, {}) | value if isinstance(value, dict) else value
        file.write_text(json.dumps(config), encoding="utf-8")
    return folder
