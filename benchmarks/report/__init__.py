"""Measuring and showing: what all benchmarks share, and the page of their results."""
