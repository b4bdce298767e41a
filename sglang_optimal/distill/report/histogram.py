"""Counts over values that stream by: what a figure needs of a billion tokens, in a few kilobytes."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

ALPHA_EDGES = np.concatenate([np.arange(-100, 0) / 10, np.arange(101) / 100, 1 + np.arange(1, 101) / 10])
ALPHA_EDGES[200] += 1e-6  # an alpha of 1 belongs to [0.99, 1]
"""Bins 0.01 wide inside [0, 1], where a solved alpha is, and 0.1 wide outside, where only a fixed one can be."""
KL_EDGES = 10.0 ** np.linspace(-6, 2, 81)
"""KL divergence of a token, nats."""
ESS_EDGES = 10.0 ** np.linspace(-4, 4, 81)
"""ESS ratio of a token; no unit."""
LOGPROB_EDGES = np.linspace(-20, 0, 81)
"""Log-probability of a token, nats."""
LATENCY_EDGES = 10.0 ** np.linspace(-3, 4, 141)
"""Seconds of a request."""
POSITION_EDGES = np.unique(np.round(np.geomspace(1, 4e6, 320)).astype(np.int64)) - 1
"""Positions in a sample, from 0: bins of one token at first, then 5 % wide."""


@dataclasses.dataclass
class Mean:
    """Mean of the finite values (a token without support has log-probability −inf)."""

    sum: float = 0.0
    count: int = 0

    def add(self, values: np.ndarray) -> None:
        values = values[np.isfinite(values)]
        self.sum += float(values.sum())
        self.count += len(values)

    @property
    def value(self) -> float | None:
        return self.sum / self.count if self.count else None


class Histogram:
    """Counts in fixed bins; values outside go to the first or last one, values that are not finite are left out.

    Args:
        edges: shape (bins + 1,), rising.

    Attributes:
        counts: shape (bins,), int64.
        low, high: smallest and largest value seen; inf and −inf before the first.
    """

    def __init__(self, edges: np.ndarray):
        self.edges = edges
        self.counts = np.zeros(len(edges) - 1, np.int64)
        self.low, self.high = math.inf, -math.inf

    def add(self, values: np.ndarray) -> None:
        values = values[np.isfinite(values)]
        if len(values):
            self.counts += np.bincount(bin_of(values, self.edges), minlength=len(self.counts))
            self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))

    def __add__(self, other: Histogram) -> Histogram:
        both = Histogram(self.edges)
        both.counts = self.counts + other.counts
        both.low, both.high = min(self.low, other.low), max(self.high, other.high)
        return both

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def quantile(self, q: float) -> float:
        """Quantile of the values, as exact as the bins; NaN of nothing."""
        return float(quantiles(self.counts[None], self.edges, [q], self.low, self.high)[0, 0])


class PositionSeries:
    """A per-token series by position in the sample.

    Args:
        edges: of value bins for quantiles; None: means only.

    Attributes:
        count, sum: shape (positions,): tokens and their sum in each bin of `POSITION_EDGES`.
        values: shape (positions, bins), int64; None without ``edges``.
    """

    def __init__(self, edges: np.ndarray | None = None):
        positions = len(POSITION_EDGES) - 1
        self.edges = edges
        self.count, self.sum = np.zeros(positions, np.int64), np.zeros(positions)
        self.values = None if edges is None else np.zeros((positions, len(edges) - 1), np.int64)

    def add(self, position_bins: np.ndarray, values: np.ndarray) -> None:
        """``position_bins``: `position_bins` of the tokens; ``values``: shape (tokens,)."""
        finite = np.isfinite(values)
        bins, values = position_bins[finite], values[finite]
        self.count += np.bincount(bins, minlength=len(self.count))
        self.sum += np.bincount(bins, weights=values, minlength=len(self.count))
        if self.values is not None and self.edges is not None:
            flat = bins * self.values.shape[1] + bin_of(values, self.edges)
            self.values += np.bincount(flat, minlength=self.values.size).reshape(self.values.shape)

    def bins(self) -> np.ndarray:
        """First indices of runs of bins that have enough tokens together for a mean without much noise."""
        enough = max(1, min(1000, int(self.count.sum()) // 20))
        starts, held = [0], 0
        for i in range(int(np.flatnonzero(self.count)[-1]) + 1):
            if held >= enough:
                starts.append(i)
                held = 0
            held += int(self.count[i])
        if held < enough // 2 and len(starts) > 1:
            starts.pop()
        return np.array(starts)

    def mean(self, starts: np.ndarray) -> np.ndarray:
        """Shape (len(starts),); NaN where no sample is."""
        total, count = np.add.reduceat(self.sum, starts), np.add.reduceat(self.count, starts)
        return np.divide(total, count, out=np.full(len(starts), np.nan), where=count > 0)

    def quantiles(self, starts: np.ndarray, qs: list[float], low: float, high: float) -> np.ndarray:
        """See `quantiles`; shape (len(qs), len(starts))."""
        if self.values is None or self.edges is None:
            raise ValueError("edges: none were given, so that there are means only.")
        return quantiles(np.add.reduceat(self.values, starts, axis=0), self.edges, qs, low, high)


def bin_of(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Index of each value's bin; the last bin has its upper edge in it, as in `numpy.histogram`."""
    return np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)


def position_bins(lengths: np.ndarray) -> np.ndarray:
    """Bin of `POSITION_EDGES` of every token of samples with ``lengths`` tokens, one sample after the other."""
    starts = np.cumsum(lengths) - lengths
    positions = np.arange(lengths.sum()) - np.repeat(starts, lengths)
    return bin_of(positions, POSITION_EDGES)


def quantiles(counts: np.ndarray, edges: np.ndarray, qs: list[float], low: float, high: float) -> np.ndarray:
    """Quantiles of binned values, linear inside a bin.

    Args:
        counts: shape (rows, bins).
        low, high: smallest and largest value of all, which no quantile passes.

    Returns:
        Shape (len(qs), rows); NaN for empty rows.
    """
    result = np.full((len(qs), len(counts)), np.nan)
    for row, line in enumerate(counts):
        cumulative = np.concatenate([[0], np.cumsum(line)])
        if cumulative[-1]:
            # Only the ends of filled bins, so that a quantile never falls into a gap.
            filled = np.flatnonzero(line)
            x = np.stack([cumulative[filled], cumulative[filled + 1]], 1).ravel()
            y = np.stack([edges[filled], edges[filled + 1]], 1).ravel()
            result[:, row] = np.clip(np.interp(np.array(qs) * cumulative[-1], x, y), low, high)
    return result
