"""One pass over the rows of a run: sums and histograms of all of them, and a few to look at."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sglang_optimal.distill.records import MODEL_COLUMNS
from sglang_optimal.distill.report.histogram import (
    ALPHA_EDGES,
    ESS_EDGES,
    KL_EDGES,
    LATENCY_EDGES,
    LOGPROB_EDGES,
    Histogram,
    Mean,
    PositionSeries,
    position_bins,
)
from sglang_optimal.distill.report.reading import RunInfo, read_batches
from sglang_optimal.distill.report.selection import Selection
from sglang_optimal.distill.store import TALLIED, Tally, find_shards
from sglang_optimal.names import SERIES

if TYPE_CHECKING:
    import pyarrow

RARE = 1e-3
"""A token with a smaller probability under the student is far from what it would write."""
BOUND_MARGIN = 1e-4
"""A solved alpha so near to a bound counts as being at it."""
MEANS = ("kl_to_student", "kl_to_teacher", "student_logprob", "teacher_logprob")


class Group:
    """The accepted records, or the rejected ones.

    Attributes:
        records, tokens: how many.
        alpha: mean over tokens. means: the same of `MEANS`.
        alpha_histogram, logprob_histogram (of the student's), kl_histograms ("kl_to_student", "kl_to_teacher"),
            ess_histogram: over tokens.
        rare: tokens with a student's probability below `RARE`, of ``known``.
        at_min, at_max: tokens with alpha at a bound.
        inner_kl: mean KLs, and inner_log_ess: mean log ESS ratio, over tokens with alpha strictly between the bounds.
        lengths: shape (longest + 1,): samples of each length. by_length: samples that ended by length.
    """

    def __init__(self) -> None:
        self.records = self.tokens = self.by_length = 0
        self.rare = self.known = self.at_min = self.at_max = 0
        self.alpha = Mean()
        self.means = {name: Mean() for name in MEANS}
        self.alpha_histogram = Histogram(ALPHA_EDGES)
        self.logprob_histogram = Histogram(LOGPROB_EDGES)
        self.kl_histograms = {name: Histogram(KL_EDGES) for name in ("kl_to_student", "kl_to_teacher")}
        self.ess_histogram = Histogram(ESS_EDGES)
        self.inner_kl = {name: Mean() for name in ("kl_to_student", "kl_to_teacher")}
        self.inner_log_ess = Mean()
        self.lengths = np.zeros(1, np.int64)


@dataclasses.dataclass
class Statistics:
    """A run in numbers.

    Attributes:
        run: of run.json.
        tally: counts of records, reasons and strategies.
        accepted, rejected: see `Group`.
        alpha_by_position, kl_by_position: over all tokens.
        latency: seconds, of all requests that have one.
        models: (values of `MODEL_COLUMNS`): records.
        selected: rows to look at.
    """

    run: RunInfo
    tally: Tally
    accepted: Group
    rejected: Group
    alpha_by_position: PositionSeries
    kl_by_position: dict[str, PositionSeries]
    latency: Histogram
    models: Counter[tuple[str | None, ...]]
    selected: list[dict[str, Any]]

    @property
    def groups(self) -> tuple[Group, Group]:
        return self.accepted, self.rejected

    @functools.cached_property
    def alpha_histogram(self) -> Histogram:
        """Over all tokens."""
        return self.accepted.alpha_histogram + self.rejected.alpha_histogram

    @property
    def lengths(self) -> np.ndarray:
        """Shape (longest + 1,): samples of each length."""
        short, long = sorted((group.lengths for group in self.groups), key=len)
        both = long.copy()
        both[: len(short)] += short
        return both

    def total(self, name: str) -> int:
        """A counter of `Group`, over both."""
        return sum(getattr(group, name) for group in self.groups)

    def mean(self, name: str) -> float | None:
        """Mean of ``alpha`` or one of `MEANS` over all tokens; None when it was not stored."""
        return merged(*(g.alpha if name == "alpha" else g.means[name] for g in self.groups)).value

    @property
    def has_series(self) -> bool:
        """Whether log-probabilities and KLs of single tokens were stored."""
        return sum(group.known for group in self.groups) > 0


def merged(*means: Mean) -> Mean:
    both = Mean()
    for mean in means:
        both += mean
    return both


def collect(folder: Path, samples: int) -> Statistics:
    """Read every record of a run once.

    Args:
        folder: of the run.
        samples: rows to select.

    Raises:
        ValueError: no run, no records, or a damaged file.
    """
    paths = [path for kind in ("accepted", "rejected") for path in find_shards(folder, kind)]
    collector = _Collector(RunInfo.read(folder), samples)
    for batch in read_batches(paths):
        collector.add(batch)
    if not collector.statistics.tally.total:
        raise ValueError(f"{folder}: the run has no records yet.")
    collector.statistics.selected = collector.selection.rows()
    return collector.statistics


class _Collector:
    def __init__(self, run: RunInfo, samples: int):
        self.selection = Selection(samples)
        kl = {name: PositionSeries() for name in ("kl_to_student", "kl_to_teacher")}
        self.statistics = Statistics(
            run, Tally(), Group(), Group(), PositionSeries(ALPHA_EDGES), kl, Histogram(LATENCY_EDGES), Counter(), []
        )

    def add(self, batch: pyarrow.RecordBatch) -> None:
        result = self.statistics
        for row in batch.select(list(TALLIED)).to_pylist():
            result.tally.add(row)
        result.models.update(zip(*(batch[name].to_pylist() for name in MODEL_COLUMNS), strict=True))
        latency = _floats(batch["latency"])
        result.latency.add(latency[latency > 0])
        accepted = batch["accepted"].to_numpy(zero_copy_only=False).astype(bool)
        for mask, group in ((accepted, result.accepted), (~accepted, result.rejected)):
            if mask.any():
                self._add_group(group, batch if mask.all() else batch.filter(_mask(mask)))
        self._select(batch, accepted)

    def _add_group(self, group: Group, batch: pyarrow.RecordBatch) -> None:
        lengths = batch["num_tokens"].to_numpy()
        group.records += batch.num_rows
        group.tokens += int(lengths.sum())
        group.by_length += sum(reason == "length" for reason in batch["finish_reason"].to_pylist())
        counts = np.bincount(lengths, minlength=len(group.lengths))
        counts[: len(group.lengths)] += group.lengths
        group.lengths = counts

        alpha_lengths, alpha = _lists(batch["alpha"])
        positions = position_bins(alpha_lengths)
        group.alpha.add(alpha)
        group.alpha_histogram.add(alpha)
        self.statistics.alpha_by_position.add(positions, alpha)
        run = self.statistics.run
        if run.method != "fixed":
            group.at_min += int((alpha <= run.alpha_min + BOUND_MARGIN).sum())
            group.at_max += int((alpha >= run.alpha_max - BOUND_MARGIN).sum())

        # A run can have records with series and without them; the latter have means alone.
        whole = alpha_lengths > 0
        for name in SERIES:
            whole &= _lists(batch[name])[0] == alpha_lengths
        if whole.any():
            self._add_series(group, batch if whole.all() else batch.filter(_mask(whole)))
        for name in MEANS:
            means = np.nan_to_num(_floats(batch[f"mean_{name}"]), nan=np.inf)[~whole]
            group.means[name].add(np.repeat(means[np.isfinite(means)], lengths[~whole][np.isfinite(means)]))

    def _add_series(self, group: Group, batch: pyarrow.RecordBatch) -> None:
        lengths, alpha = _lists(batch["alpha"])
        positions = position_bins(lengths)
        series = {name: _lists(batch[name])[1] for name in SERIES}
        run = self.statistics.run
        inner = np.isfinite(alpha)
        if run.method != "fixed":
            inner &= (alpha > run.alpha_min + BOUND_MARGIN) & (alpha < run.alpha_max - BOUND_MARGIN)
        for name in MEANS:
            group.means[name].add(series[name])
        for name, by_position in self.statistics.kl_by_position.items():
            group.kl_histograms[name].add(series[name])
            group.inner_kl[name].add(series[name][inner])
            by_position.add(positions, series[name])
        group.known += len(alpha)
        # What could not be stored was −inf: no probability at all.
        group.rare += int((~(series["student_logprob"] >= np.log(RARE))).sum())
        group.logprob_histogram.add(np.nan_to_num(series["student_logprob"], nan=LOGPROB_EDGES[0]))
        group.ess_histogram.add(series["ess_ratio"])
        ess = series["ess_ratio"][inner]
        group.inner_log_ess.add(np.log(ess[ess > 0]))

    def _select(self, batch: pyarrow.RecordBatch, accepted: np.ndarray) -> None:
        reasons = list(zip(batch["rejected_by"].to_pylist(), batch["reject_reason"].to_pylist(), strict=True))
        for i, key in enumerate(self.selection.keys(batch.num_rows)):
            stratum = None if accepted[i] else reasons[i]
            if self.selection.wants(stratum, key):
                self.selection.add(stratum, key, batch.slice(i, 1).to_pylist()[0])


def _lists(column: pyarrow.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of the lists, and their values one after the other; float64 with NaN for null."""
    lengths = column.value_lengths().fill_null(0).to_numpy().astype(np.int64)
    return lengths, _floats(column.flatten())


def _floats(column: pyarrow.Array) -> np.ndarray:
    return column.to_numpy(zero_copy_only=False).astype(np.float64)


def _mask(mask: np.ndarray) -> pyarrow.Array:
    import pyarrow

    return pyarrow.array(mask)
