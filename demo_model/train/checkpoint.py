"""Training checkpoints, written atomically."""

from pathlib import Path
from typing import Any

import torch


def save_checkpoint(path: Path, state: dict[str, Any], step: int) -> None:
    """Write the ``state_dict`` of each object, the RNG state and ``step``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {name: item.state_dict() for name, item in state.items()}
    partial = path.with_suffix(".partial")
    torch.save({"step": step, "rng": torch.get_rng_state(), **content}, partial)
    partial.replace(path)


def load_checkpoint(path: Path, state: dict[str, Any]) -> int:
    """Restore a checkpoint into ``state`` and return its step, or 0 if there is no checkpoint."""
    if not path.exists():
        return 0
    content = torch.load(path, weights_only=True)
    for name, item in state.items():
        item.load_state_dict(content[name])
    torch.set_rng_state(content["rng"])
    return int(content["step"])
