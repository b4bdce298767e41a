"""Benchmarks, each a module with ``--help``: ``python -m bench.throughput``, from the repository's root."""
