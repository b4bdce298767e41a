"""Distillation data: problems in, samples of the mixture out, filtered and stored. See docs/distillation_guide.md.

``python -m sglang_optimal.distill run CONFIG.yaml`` does it; `run`, `load_config`, `export` and `write_report` are
the same from Python.
"""

from __future__ import annotations

import importlib

_MODULES = {
    "DistillConfig": "config",
    "Record": "records",
    "RunResult": "pipeline",
    "export": "export",
    "load_config": "config",
    "run": "pipeline",
    "write_report": "report",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str):
    if name in _MODULES:
        return getattr(importlib.import_module(f"sglang_optimal.distill.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
