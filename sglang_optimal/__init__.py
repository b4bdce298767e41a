"""Sample every token from the optimal mixture of two models, inside unmodified SGLang."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sglang_optimal.engine import AlphaStats, GenerationResult, OptimalSampler

__all__ = ["AlphaStats", "GenerationResult", "OptimalSampler", "__version__"]


def __getattr__(name: str):
    # Importing the engine imports SGLang; the plugin entry points must stay light.
    if name in ("AlphaStats", "GenerationResult", "OptimalSampler"):
        from sglang_optimal import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
