"""Prometheus metrics of mixing, ``sglang_optimal:*``, beside SGLang's own under ``--enable-metrics``.

Imported only after SGLang has prepared the directory that prometheus_client shares between processes.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from prometheus_client import Counter, Gauge, Histogram

from sglang_optimal.names import SERIES
from sglang_optimal.runtime.mem_cache.guest_kv import GuestKV
from sglang_optimal.runtime.sampling.sampling_observer import EqualSides

ALPHA_BUCKETS = tuple(round(0.05 * i, 2) for i in range(21))
KL_BUCKETS = (1e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)  # nats
REFRESH_SECONDS = 1.0

_ALPHA, _KL_STUDENT, _KL_TEACHER = (SERIES.index(name) for name in ("alpha", "kl_to_student", "kl_to_teacher"))


class MixingMetrics:
    """Counts in memory and publishes about once a second, so that a step costs microseconds.

    Args:
        labels: the labels of SGLang's own scheduler metrics.
        guest_kv: the guest's KV, for its pool and radix cache.
        equal_sides: of the worker's observer.
        guest: its side, for the names.
    """

    def __init__(self, labels: dict[str, Any], guest_kv: GuestKV, equal_sides: EqualSides, guest: str):
        names = list(labels)
        self._kv = guest_kv
        self._equal_sides = equal_sides

        def counter(name: str, text: str):
            return Counter(f"sglang_optimal:{name}", text, names).labels(**labels)

        def gauge(name: str, text: str):
            return Gauge(f"sglang_optimal:{name}", text, names, multiprocess_mode="mostrecent").labels(**labels)

        self.requests = counter("mixed_requests", "Mixed requests received.")
        self._tokens = counter("mixed_tokens", "Tokens sampled from a mixture.")
        self._equal_tokens = counter(
            "equal_sides_tokens", "Those of them with the same distribution on both sides although the contexts differ."
        )
        self._prompt_tokens = counter(f"{guest}_prompt_tokens", f"Tokens of the {guest} contexts that were prefilled.")
        self._cached_tokens = counter(f"{guest}_cached_tokens", f"Those of them that the {guest}'s radix cache had.")
        self._mean_alpha = gauge("mean_alpha", "Mean alpha of the tokens sampled in about the last second.")
        self._hit_rate = gauge(f"{guest}_cache_hit_rate", f"Share of {guest} prompt tokens found in its radix cache.")
        self._pool_usage = gauge(f"{guest}_pool_usage", f"Share of the {guest}'s KV pool that requests hold.")
        alpha = Histogram("sglang_optimal:alpha", "Alpha of each token.", names, buckets=ALPHA_BUCKETS)
        kl = Histogram(
            "sglang_optimal:kl", "KL(mixture, side) of each token, in nats.", [*names, "side"], buckets=KL_BUCKETS
        )
        self._histograms = {
            _ALPHA: _Tally(alpha.labels(**labels), ALPHA_BUCKETS),
            _KL_STUDENT: _Tally(kl.labels(**labels, side="student"), KL_BUCKETS),
            _KL_TEACHER: _Tally(kl.labels(**labels, side="teacher"), KL_BUCKETS),
        }
        self._seen = (0, 0, 0)  # prompt tokens, cached ones, and tokens of equal sides published
        self._published = time.monotonic()

    def observe(self, rows: list[list[float]]) -> None:
        """Count sampled tokens; each row has the values of ``SERIES``."""
        values = np.asarray(rows)
        for column, tally in self._histograms.items():
            tally.add(values[:, column])

    def refresh(self) -> None:
        """Publish, unless that was done within the last second."""
        now = time.monotonic()
        if now - self._published < REFRESH_SECONDS:
            return
        self._published = now
        alpha = self._histograms[_ALPHA]
        if alpha.count:
            self._tokens.inc(alpha.count)
            self._mean_alpha.set(alpha.total / alpha.count)
        for tally in self._histograms.values():
            tally.publish()
        prompt, cached, equal = self._kv.prompt_tokens, self._kv.cached_tokens, self._equal_sides.tokens
        counters = (self._prompt_tokens, self._cached_tokens, self._equal_tokens)
        for total, seen, published in zip((prompt, cached, equal), self._seen, counters, strict=True):
            published.inc(total - seen)
        self._seen = (prompt, cached, equal)
        if prompt:
            self._hit_rate.set(cached / prompt)
        self._pool_usage.set(1.0 - self._kv.available() / self._kv.size)


class _Tally:
    """Bucket counts that a histogram has not been told yet."""

    def __init__(self, histogram, bounds: tuple[float, ...]):
        self._histogram = histogram
        self._bounds = np.asarray(bounds)
        self._reset()

    def _reset(self) -> None:
        self._counts = np.zeros(len(self._bounds) + 1, dtype=np.int64)
        self.total, self.count = 0.0, 0

    def add(self, values: np.ndarray) -> None:
        self._counts += np.bincount(np.searchsorted(self._bounds, values), minlength=len(self._counts))
        self.total += float(values.sum())
        self.count += values.size

    def publish(self) -> None:
        if self.count == 0:
            return
        # prometheus_client takes one value at a time in public; a call for each token would cost more than the mixing.
        for bucket, count in zip(self._histogram._buckets, self._counts.tolist(), strict=True):
            if count:
                bucket.inc(count)
        self._histogram._sum.inc(self.total)
        self._reset()
