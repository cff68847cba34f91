"""Benchmarks. Each prints system information and, as the last line, JSON. The services do not import this package."""
