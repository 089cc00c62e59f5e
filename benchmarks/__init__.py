"""Benchmarks. Each is a command that prints a table: `python -m benchmarks.NAME --help`."""
