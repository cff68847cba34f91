"""Model folders without weights, in the layout of FLUX.2 [dev], for models with random weights."""

from pathlib import Path

FULL = Path(__file__).parent / "full"
"""Configuration of FLUX.2 [dev]. The tokenizer is that of the demo model, because benchmarks start from token ids."""
TINY = Path(__file__).parent / "tiny"
"""Configuration of a tiny transformer and VAE for CPUs."""
