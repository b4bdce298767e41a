"""Samples to look at: half of them accepted, the others spread over the reasons for rejection."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np

Stratum = tuple[str, str] | None
"""None for accepted records, else (filter, reason)."""


class Selection:
    """A random choice from a stream of rows whose number is not known, with room for ``size`` rows in all.

    Every row draws a key, and each stratum keeps the rows with the smallest keys; when there are too many, the largest
    stratum gives one up and from then on takes only smaller keys. So each stratum's rows are a uniform sample of it.

    Args:
        size: most rows to keep.
    """

    def __init__(self, size: int):
        self._size = size
        self._random = np.random.default_rng(0)
        self._kept: dict[Stratum, list[tuple[float, int, dict[str, Any]]]] = {}
        self._limits: dict[Stratum, float] = {}
        self._total = self._number = 0

    def keys(self, count: int) -> np.ndarray:
        """Keys for so many rows."""
        return self._random.random(count)

    def wants(self, stratum: Stratum, key: float) -> bool:
        return self._size > 0 and key < self._limits.get(stratum, 1.0)

    def add(self, stratum: Stratum, key: float, row: dict[str, Any]) -> None:
        """Keep a row that `wants` agreed to."""
        self._number += 1  # keys may tie, and rows have no order
        heapq.heappush(self._kept.setdefault(stratum, []), (-key, self._number, row))
        self._total += 1
        if self._total > self._size:
            given_up = self._largest()
            negative, _, _ = heapq.heappop(self._kept[given_up])
            self._limits[given_up] = -negative
            self._total -= 1

    def rows(self) -> list[dict[str, Any]]:
        """In the order of the run."""
        entries = [entry for kept in self._kept.values() for entry in kept]
        return [row for _, _, row in sorted(entries, key=lambda entry: entry[1])]

    def _largest(self) -> Stratum:
        if 2 * len(self._kept.get(None, ())) > self._total:
            return None
        return max((s for s in self._kept if s is not None), key=lambda s: len(self._kept[s]))
