"""Model folders without weights, for models whose weights are random: laid out as FLUX.2 [dev]'s is."""

from pathlib import Path

FULL = Path(__file__).parent / "full"
"""FLUX.2 [dev]'s configuration. The tokenizer is the demo model's: benchmarks of the encoder begin with token ids."""
TINY = Path(__file__).parent / "tiny"
"""The generator's part of one that a CPU runs in no time."""
