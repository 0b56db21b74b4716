"""Benchmarks beside the peers that users would take instead: `python -m tools.bench NAME --help`."""
