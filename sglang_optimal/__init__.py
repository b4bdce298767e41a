"""Sample every token from the optimal mixture of two models, inside unmodified SGLang."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sglang_optimal.engine import AlphaStats, GenerationResult, OptimalSampler
    from sglang_optimal.lang import Runtime, mixed_gen, state_text, state_var
    from sglang_optimal.top_k import decode_top_k

_MODULES = {
    "AlphaStats": "engine",
    "GenerationResult": "engine",
    "OptimalSampler": "engine",
    "Runtime": "lang",
    "decode_top_k": "top_k",
    "mixed_gen": "lang",
    "state_text": "lang",
    "state_var": "lang",
}

__all__ = [
    "AlphaStats",
    "GenerationResult",
    "OptimalSampler",
    "Runtime",
    "__version__",
    "decode_top_k",
    "mixed_gen",
    "state_text",
    "state_var",
]


def __getattr__(name: str):
    # These import SGLang; the plugin entry points must stay light.
    if name in _MODULES:
        return getattr(importlib.import_module(f"sglang_optimal.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
