"""Benchmarks of the services over HTTP, and of many generators."""
