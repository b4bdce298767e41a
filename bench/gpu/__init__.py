"""Checks of a machine with one GPU, see README.md beside this: ``python -m bench.gpu.run_checks --stage all``."""
