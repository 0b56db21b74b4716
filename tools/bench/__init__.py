"""Benchmarks against the peers that users would take instead: `python -m tools.bench NAME --help`."""
