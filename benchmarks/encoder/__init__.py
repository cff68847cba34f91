"""Benchmarks of the text encoder."""
