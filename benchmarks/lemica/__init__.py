"""Benchmarks of LeMiCa, and of other methods that skip steps."""
