"""One pass over the rows of a run: sums and histograms of all of them, and a few to look at."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet as parquet

from sglang_optimal.config import override
from sglang_optimal.distill.escalation import stored_steps
from sglang_optimal.distill.manifests import read_manifests
from sglang_optimal.distill.records import MODEL_COLUMNS, schema
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
from sglang_optimal.distill.report.samples import Selection
from sglang_optimal.distill.store import TALLIED, Tally, find_shards, present_files, read_rows
from sglang_optimal.distill.surprise import LEAP, RARE
from sglang_optimal.names import SERIES

BOUND_MARGIN = 1e-4
"""A solved alpha so near to a bound counts as being at it."""
SEVERAL = "several"
KLS = ("kl_to_student", "kl_to_teacher")
_BATCH = 256
"""Rows in memory at a time."""


@dataclasses.dataclass
class RunInfo:
    """What run.json says, of all machines.

    Attributes:
        name: of the folder.
        config: the settings of the run; {} when not known.
        method: how alpha was solved; None: left to the server. `SEVERAL`: in different ways, in runs that were merged,
            or at the steps of an escalation.
        alpha_min, alpha_max: bounds on the solved alpha, infinite for ``fixed`` and `SEVERAL`. fixed_alpha: its
        alpha.
        kl_budget: nats, of the methods that have a budget.
        alone: the side that ran alone; None where both did.
        steps: of an escalation, as its settings have them.
        filters: labels in their order.
        states: of all machines. planned, failed: samples. elapsed: seconds of sampling, summed over machines.
        started: the earliest start.
    """

    name: str
    config: dict[str, Any]
    method: str | None
    alpha_min: float
    alpha_max: float
    fixed_alpha: float | None
    kl_budget: float | None
    alone: str | None
    steps: list[dict[str, Any]] | None
    filters: list[str]
    states: set[str]
    machines: int
    planned: int
    failed: int
    elapsed: float
    started: str | None

    @classmethod
    def read(cls, folder: Path) -> RunInfo:
        """Raises ValueError: a run.json is damaged."""
        manifests = read_manifests(folder)
        config: dict[str, Any] = next((m["config"] for m in manifests if m.get("config")), {})
        mixing = {name: value for name, value in (config.get("mixing") or {}).items() if value is not None}
        method = override({}, mixing).get("alpha_method")
        sources = [(source.get("config") or {}).get("mixing") for m in manifests for source in m.get("sources") or ()]
        steps = stored_steps(manifests)
        if steps or any(source != sources[0] for source in sources):
            method, mixing = SEVERAL, {}
        ran = {m.get("models_run") or "both" for m in manifests}
        bounds = {"alpha_min": 0, "alpha_max": 1} | mixing if method not in ("fixed", SEVERAL) else {}
        configured = [f.get("name") or f.get("type") or "?" for f in config.get("filters") or []]
        return cls(
            name=folder.resolve().name,
            config=config,
            method=method,
            alpha_min=float(bounds.get("alpha_min", -math.inf)),
            alpha_max=float(bounds.get("alpha_max", math.inf)),
            fixed_alpha=mixing.get("fixed_alpha"),
            kl_budget=mixing.get("kl_budget", mixing.get("kl_budget_teacher")),
            alone=ran.pop() if len(ran) == 1 and "both" not in ran else None,
            steps=steps,
            filters=next((m["filters"] for m in manifests if m.get("filters")), configured),
            states={m["state"] for m in manifests if m.get("state")},
            machines=len(manifests),
            planned=sum(m.get("planned") or 0 for m in manifests),
            failed=sum(m.get("failed") or 0 for m in manifests),
            elapsed=sum(m.get("elapsed_seconds") or 0.0 for m in manifests),
            started=min((m["started"] for m in manifests if m.get("started")), default=None),
        )


class Group:
    """The accepted records, or the rejected ones.

    Attributes:
        lengths: tokens of a sample: samples.
        alpha, student_logprob: histograms over tokens. logprob: mean of the student's log-probability over tokens.
        rare: tokens with a student's probability below `RARE`, of ``student_logprob.total``.
        surprising: samples with such a token, of judged. least: histogram over samples, of the student's
            log-probability of the token that surprises most.
        leaps: samples with a student's probability of the answer below `LEAP` where it first stands, of answered.
    """

    def __init__(self) -> None:
        self.lengths: Counter[int] = Counter()
        self.alpha, self.student_logprob = Histogram(ALPHA_EDGES), Histogram(LOGPROB_EDGES)
        self.logprob = Mean()
        self.least = Histogram(LOGPROB_EDGES)
        self.rare = self.surprising = self.judged = self.leaps = self.answered = 0

    def add_surprises(self, rare: np.ndarray, least: np.ndarray, answer: np.ndarray) -> None:
        """Of samples, shape (samples,), NaN where it is not known: tokens below `RARE`, the least log-probability, and
        the probability of the answer."""
        judged, answered = ~np.isnan(rare), ~np.isnan(answer)
        self.judged += int(judged.sum())
        self.surprising += int((rare[judged] > 0).sum())
        self.least.add(np.maximum(least, LOGPROB_EDGES[0]))
        self.answered += int(answered.sum())
        self.leaps += int((answer[answered] < LEAP).sum())


@dataclasses.dataclass
class StrategyCounts:
    """A prefix strategy.

    Attributes:
        logprob: mean of the student's log-probability over the tokens of accepted samples, nats.
        surprising: accepted samples with a token below `RARE`, of judged.
        sound: samples that passed the filter `equations`, of reached, which earlier filters had passed.
    """

    logprob: Mean = dataclasses.field(default_factory=Mean)
    surprising: int = 0
    judged: int = 0
    sound: int = 0
    reached: int = 0


class Statistics:
    """A run in numbers.

    Args:
        run: of run.json.
        samples: rows to select.

    Attributes:
        tally: counts of records, reasons and strategies. models: (values of `MODEL_COLUMNS`): records.
        accepted, rejected: see `Group`.
        means: of ``alpha`` and `KLS` over all tokens. histograms: of `KLS` and ``ess_ratio``, over all tokens.
        by_position: ``alpha`` and `KLS`, over all tokens.
        known: tokens with log-probabilities and KLs of their own.
        at_min, at_max: tokens with alpha at a bound. inner_tokens: tokens with alpha strictly between the bounds, and
        inner: means of `KLS` and ``log_ess`` over them.
        by_length: samples that ended by length.
        strategies: by name. equations: label of the run's filter of this kind, None without one.
        latency: seconds, of all requests that have one.
        selection: rows to look at.
    """

    def __init__(self, run: RunInfo, samples: int):
        self.run = run
        self.tally, self.models = Tally(), Counter[tuple[str | None, ...]]()
        self.accepted, self.rejected = Group(), Group()
        self.means = {name: Mean() for name in ("alpha", *KLS)}
        self.histograms = {name: Histogram(KL_EDGES) for name in KLS} | {"ess_ratio": Histogram(ESS_EDGES)}
        self.by_position = {"alpha": PositionSeries(ALPHA_EDGES)} | {name: PositionSeries() for name in KLS}
        self.known = self.at_min = self.at_max = self.inner_tokens = self.by_length = 0
        self.inner = {name: Mean() for name in (*KLS, "log_ess")}
        self.strategies: dict[str, StrategyCounts] = defaultdict(StrategyCounts)
        configured = run.config.get("filters") or []
        self.equations = next((f.get("name") or f["type"] for f in configured if f.get("type") == "equations"), None)
        self.latency = Histogram(LATENCY_EDGES)
        self.selection = Selection(samples)

    @property
    def groups(self) -> tuple[Group, Group]:
        return self.accepted, self.rejected

    @property
    def alpha_histogram(self) -> Histogram:
        """Over all tokens."""
        return self.accepted.alpha + self.rejected.alpha

    def add(self, batch: pyarrow.RecordBatch) -> None:
        """Count stored rows."""
        for row in batch.select(list(TALLIED)).to_pylist():
            self.tally.add(row)
        self.models.update(zip(*(batch[name].to_pylist() for name in MODEL_COLUMNS), strict=True))
        self.by_length += batch["finish_reason"].to_pylist().count("length")
        latency = _floats(batch["latency"])
        self.latency.add(latency[latency > 0])
        sizes, accepted = batch["num_tokens"].to_numpy(), _floats(batch["accepted"]) > 0
        lengths, alpha = _lists(batch["alpha"])
        # A run can have records with series and without them; the latter have means alone.
        whole = (lengths > 0) & np.all([_lists(batch[name])[0] == lengths for name in SERIES], axis=0)
        for group, mask in ((self.accepted, accepted), (self.rejected, ~accepted)):
            group.lengths.update(sizes[mask].tolist())
            group.alpha.add(alpha[np.repeat(mask, lengths)])
            group.logprob.add(_repeated(batch["mean_student_logprob"], sizes, mask & ~whole))
        self._add_surprises(batch, whole, accepted)
        for name in KLS:
            self.means[name].add(_repeated(batch[f"mean_{name}"], sizes, ~whole))
        self.means["alpha"].add(alpha)
        self.by_position["alpha"].add(position_bins(lengths), alpha)
        self.at_min += int((alpha <= self.run.alpha_min + BOUND_MARGIN).sum())
        self.at_max += int((alpha >= self.run.alpha_max - BOUND_MARGIN).sum())
        if whole.any():
            self._add_series(batch.filter(pyarrow.array(whole)), accepted[whole])
        reasons = zip(batch["rejected_by"].to_pylist(), batch["reject_reason"].to_pylist(), strict=True)
        for i, reason in enumerate(reasons):
            row = functools.partial(_row, batch, i)
            self.selection.offer(None if accepted[i] else reason, row)

    def _add_surprises(self, batch: pyarrow.RecordBatch, whole: np.ndarray, accepted: np.ndarray) -> None:
        rare, least = _surprises(batch, whole)
        answer = _floats(batch["answer_probability"])
        logprob, sizes = _floats(batch["mean_student_logprob"]), batch["num_tokens"].to_numpy()
        rare[sizes == 0] = np.nan  # what a server refused is no calm sample
        for group, mask in ((self.accepted, accepted), (self.rejected, ~accepted)):
            group.add_surprises(rare[mask], least[mask], answer[mask])
        labels = self.run.filters
        place = labels.index(self.equations) if self.equations in labels else None
        columns = (batch[name].to_pylist() for name in ("strategy", "rejected_by"))
        for i, (strategy, rejected_by) in enumerate(zip(*columns, strict=True)):
            counts = self.strategies[strategy]
            if accepted[i]:
                counts.logprob.add(np.repeat(logprob[i], sizes[i]))
                counts.judged += not np.isnan(rare[i])
                counts.surprising += bool(rare[i] > 0)
            if place is not None and (accepted[i] or rejected_by in labels[place:]):
                counts.reached += 1
                counts.sound += rejected_by != self.equations

    def _add_series(self, batch: pyarrow.RecordBatch, accepted: np.ndarray) -> None:
        lengths, alpha = _lists(batch["alpha"])
        series, positions = {name: _lists(batch[name])[1] for name in SERIES}, position_bins(lengths)
        inner = (alpha > self.run.alpha_min + BOUND_MARGIN) & (alpha < self.run.alpha_max - BOUND_MARGIN)
        self.known += len(inner)
        self.inner_tokens += int(inner.sum())
        for name in KLS:
            self.means[name].add(series[name])
            self.inner[name].add(series[name][inner])
            self.by_position[name].add(positions, series[name])
        for name, histogram in self.histograms.items():
            histogram.add(series[name])
        ess = series["ess_ratio"][inner]
        self.inner["log_ess"].add(np.log(ess[ess > 0]))
        of_accepted = np.repeat(accepted, lengths)
        for group, mask in ((self.accepted, of_accepted), (self.rejected, ~of_accepted)):
            logprob = series["student_logprob"][mask]
            group.logprob.add(logprob)
            # What could not be stored was −inf: no probability at all.
            group.rare += int((~(logprob >= np.log(RARE))).sum())
            group.student_logprob.add(np.nan_to_num(logprob, nan=LOGPROB_EDGES[0]))


def collect(folder: Path, samples: int) -> Statistics:
    """Read every record of a run once.

    Args:
        folder: of the run.
        samples: rows to select.

    Raises:
        ValueError: no run, no records, or a damaged file.
    """
    paths = [path for kind in ("accepted", "rejected") for path in find_shards(folder, kind)]
    statistics = Statistics(RunInfo.read(folder), samples)
    for batch in _read_batches(paths):
        statistics.add(batch)
    if not statistics.tally.total:
        raise ValueError(f"{folder}: the run has no records yet.")
    return statistics


def _read_batches(paths: list[Path]) -> Iterator[pyarrow.RecordBatch]:
    """Stored rows of shards and journals.

    Raises:
        ValueError: a file is damaged.
        FileNotFoundError: one is gone.
    """
    columns = schema()
    for path in present_files(paths):
        try:
            if path.suffix == ".parquet":
                with parquet.ParquetFile(path) as file:
                    for batch in file.iter_batches(batch_size=_BATCH, columns=columns.names):
                        whole = batch.schema.names == columns.names
                        # Older versions had fewer columns.
                        yield batch if whole else pyarrow.RecordBatch.from_pylist(batch.to_pylist(), columns)
            else:
                rows = read_rows([path], columns.names)
                while some := list(itertools.islice(rows, _BATCH)):
                    yield pyarrow.RecordBatch.from_pylist(some, columns)
        except (pyarrow.ArrowException, KeyError) as error:
            raise ValueError(f"{path}: is damaged or no shard of a run: {error}") from None


def _lists(column: pyarrow.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of the lists, and their values one after the other; float64 with NaN for null."""
    lengths = column.value_lengths().fill_null(0).to_numpy().astype(np.int64)
    return lengths, _floats(column.flatten())


def _surprises(batch: pyarrow.RecordBatch, whole: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each row: how many tokens have a student's probability below `RARE`, and the log-probability of the least
    likely token, nats. From the columns, in rows of older versions from the series; NaN where neither is."""
    # A copy: Arrow's may be read-only.
    rare, least = (np.array(_floats(batch[name])) for name in ("rare_tokens", "min_student_logprob"))
    old = whole & np.isnan(rare)
    if old.any():
        lengths, logprob = _lists(batch.filter(pyarrow.array(old))["student_logprob"])
        logprob = np.nan_to_num(logprob, nan=-np.inf)
        starts = np.cumsum(lengths) - lengths
        rare[old] = np.add.reduceat((logprob < np.log(RARE)).astype(np.float64), starts)
        least[old] = np.minimum.reduceat(logprob, starts)
    least[np.isnan(least) & (rare > 0)] = -np.inf
    return rare, least


def _floats(column: pyarrow.Array) -> np.ndarray:
    return column.to_numpy(zero_copy_only=False).astype(np.float64)


def _repeated(means: pyarrow.Array, sizes: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The means of the records of ``mask``, each as often as the record has tokens."""
    return np.repeat(_floats(means)[mask], sizes[mask])


def _row(batch: pyarrow.RecordBatch, i: int) -> dict[str, Any]:
    return batch.slice(i, 1).to_pylist()[0]
