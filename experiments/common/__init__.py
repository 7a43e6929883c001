"""Modules that experiments, benchmarks and examples share."""
