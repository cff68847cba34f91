"""Runs ``benchmarks.report.page`` as ``python -m benchmarks.report``."""

from benchmarks.report.page import main

main()
