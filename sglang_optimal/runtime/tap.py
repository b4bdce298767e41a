"""What a mixed request's answers say about its mixing, for handlers that only see text: the OpenAI routes."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import AsyncIterator
from typing import Any

from sglang_optimal.series import SERIES

MIXING_TAP: contextvars.ContextVar[MixingTap | None] = contextvars.ContextVar("mixing_tap", default=None)
"""Set while a handler starts a request that it wants to follow."""


def series_of(meta_info: dict[str, Any], start: int = 0) -> dict[str, list[float]]:
    """The per-token series in ``meta_info``, from token ``start`` on; empty for a plain request."""
    return {name: meta_info[name][start:] for name in SERIES if meta_info.get(name) is not None}


class MixingTap:
    """Remembers the series of each choice and which of their tokens were taken."""

    def __init__(self) -> None:
        self._meta: dict[int, dict[str, Any]] = {}
        self._taken: dict[int, int] = {}

    async def follow(self, outputs: AsyncIterator[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
        """Yield what ``outputs`` yields."""
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                self._meta[output.get("index", 0)] = output["meta_info"]
                yield output

    def take(self, index: int) -> dict[str, list[float]]:
        """Series of the tokens of choice ``index`` that were not taken before."""
        series = series_of(self._meta.get(index, {}), self._taken.get(index, 0))
        new = len(series.get("alpha", ()))
        if not new:
            return {}
        self._taken[index] = self._taken.get(index, 0) + new
        return series
