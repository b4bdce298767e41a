"""Runs side by side on the problems that they have in common: all samples, equal tokens, equal forward passes."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sglang_optimal.distill.equations import equations
from sglang_optimal.distill.escalation import step_rows, stored_steps
from sglang_optimal.distill.intervals import CONFIDENCE, mcnemar, wilson
from sglang_optimal.distill.manifests import read_manifests
from sglang_optimal.distill.passes import passes
from sglang_optimal.distill.records import sha256
from sglang_optimal.distill.store import KINDS, Tally, find_shards, read_rows
from sglang_optimal.distill.surprise import RARE, tokens_below

RESAMPLES = 10_000
"""Of the problems, for an interval of a difference."""
CHUNK = 250
"""Resamples in memory at a time."""
LEVELS = {"all": "all samples", "tokens": "equal tokens", "passes": "equal forward passes"}


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One sample.

    Attributes:
        order: (step, sample_index, id): its place among those of its problem. step: 0 where the run has none.
        accepted, tokens, passes: see `passes`.
        logprob: mean log-probability of its tokens under the student, nats; None without tokens, or where it is −inf.
        surprising: whether a token is a surprise; None where that was not stored.
        kl: mean KL(mixture‖student) of its tokens, nats; None without tokens, or where it was not stored.
        equations: of an accepted text, whether all its equations are true; None without any, or where nobody asked.
    """

    order: tuple[int, int, str]
    accepted: bool
    tokens: int
    passes: int
    logprob: float | None
    surprising: bool | None
    kl: float | None = None
    equations: bool | None = None


@dataclasses.dataclass
class Run:
    """name: in the table. folder. complete: it came to its end. problems: id: its samples in their order. fields: id: a
    hash of the problem. steps: of an escalation, see `sglang_optimal.distill.escalation.step_rows`; over all its
    problems."""

    name: str
    folder: Path
    complete: bool
    problems: dict[str, list[Drawn]]
    fields: dict[str, str]
    steps: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def compare(folders: Sequence[Path], *, seed: int = 0, texts: bool = False) -> dict[str, Any]:
    """Compare runs, paired by problem.

    At each level every run has a part of its samples: all of them; or, in rounds (each problem's first sample, in the
    order of the problems' ids, then each one's second, …), those before the first that would go beyond the number of
    tokens, or of forward passes (`passes`), that the run with the fewest has. Samples of a problem are in the order of
    step, sample_index and id.

    Args:
        folders: of two runs or more.
        seed: of the bootstrap.
        texts: whether to look for equations in the accepted texts (`sglang_optimal.distill.equations`), and count those
            in which there are some (``with_equations``) and all are true (``sound``).

    Returns:
        What `table` shows and ``--output`` writes: ``problems`` (in common, and of each run), ``runs``, and for each of
        `LEVELS` the ``budget``, the figures of each run and the differences of each pair, second minus first. Shares
        have Wilson's interval (Wilson 1927; of accepted samples as if a problem's were independent), differences the
        percentiles of a paired bootstrap over problems (Efron 1979), and problems covered the exact test of McNemar
        (1947), two-sided.

    Raises:
        ValueError: fewer than two runs, one twice, no problem in common, one id for different problems, or a damaged
            file.
    """
    runs = _read(folders, texts=texts)
    common = sorted(set.intersection(*(set(run.problems) for run in runs)))
    if not common:
        raise ValueError("compare: the runs have no problem in common (by problem_id), so nothing can be paired.")
    for run in runs[1:]:
        for name in common:
            if run.fields[name] != runs[0].fields[name]:
                raise ValueError(
                    f"problem {name!r} of {run.folder} has other fields than in {runs[0].folder}; compare runs over "
                    "the same data."
                )
    levels: dict[str, dict[str, Any]] = {}
    for level, words in LEVELS.items():
        cost = _COSTS[level]
        budget = None if cost is None else min(sum(cost(s) for s in _rounds(run, common)) for run in runs)
        parts = [_Part(run, common, cost, budget) for run in runs]
        resampled = _resampled(parts, seed)
        pairs = [(j, i) for i in range(len(runs)) for j in range(i + 1, len(runs))]
        levels[level] = {
            "means": words,
            "budget": budget,
            "runs": {
                run.name: part.figures() | {"student_logprob_interval": _interval("student_logprob", sums)}
                for run, part, sums in zip(runs, parts, resampled, strict=True)
            },
            "differences": [
                {"of": runs[j].name, "minus": runs[i].name}
                | _difference(parts[j], parts[i], resampled[j], resampled[i])
                for j, i in pairs
            ],
        }
    return {
        "problems": {"common": len(common), "of": {run.name: len(run.problems) for run in runs}},
        "runs": [
            {"name": run.name, "complete": run.complete} | ({"steps": run.steps} if run.steps else {}) for run in runs
        ],
        "confidence": CONFIDENCE,
        "bootstrap": {"resamples": RESAMPLES, "seed": seed, "unit": "problem"},
        "surprise_below": RARE,
        "levels": levels,
    }


def _read(folders: Sequence[Path], *, texts: bool) -> list[Run]:
    folders = [Path(folder) for folder in folders]
    if len({folder.resolve() for folder in folders}) < max(len(folders), 2):
        raise ValueError("compare: give two or more runs, each once.")
    last = Counter(folder.resolve().name for folder in folders)
    names = [folder.resolve().name if last[folder.resolve().name] == 1 else str(folder) for folder in folders]
    return [_run(name, folder, texts=texts) for name, folder in zip(names, folders, strict=True)]


_COLUMNS = (
    "id", "problem_id", "sample_index", "accepted", "num_tokens", "mean_student_logprob", "sampling", "fields",
    "student_logprob", "mean_kl_to_student",
)  # fmt: skip


def _run(name: str, folder: Path, *, texts: bool) -> Run:
    manifests, tally = read_manifests(folder), Tally()
    run = Run(name, folder, {m.get("state") for m in manifests} <= {"complete"}, {}, {})
    for path in [path for kind in KINDS for path in find_shards(folder, kind)]:
        for row in read_rows([path], [*_COLUMNS, "rare_tokens", "step", *(["text"] if texts else [])]):
            run.problems.setdefault(row["problem_id"], []).append(_drawn(row))
            run.fields[row["problem_id"]] = sha256(row["fields"])
            if row["step"] is not None:
                tally.add_step(row)
    run.steps = list(step_rows(tally, stored_steps(manifests)))
    for samples in run.problems.values():
        samples.sort(key=lambda sample: sample.order)
    return run


def _drawn(row: dict[str, Any]) -> Drawn:
    tokens, logprobs, rare = row["num_tokens"], row["student_logprob"] or [], row["rare_tokens"]
    if rare is None and len(logprobs) == tokens:  # of an older version
        rare = tokens_below(logprobs)
    surprising = None if rare is None else rare > 0
    order = (row["step"] or 0, row["sample_index"], row["id"])
    found = equations(row["text"]) if row["accepted"] and "text" in row else []
    return Drawn(
        order, row["accepted"], tokens, passes(row), row["mean_student_logprob"], surprising,
        row["mean_kl_to_student"], all(equation.true for equation in found) if found else None,
    )  # fmt: skip


Cost = Callable[[Drawn], int]
_COSTS: dict[str, Cost | None] = {"all": None, "tokens": lambda s: s.tokens, "passes": lambda s: s.passes}


def _rounds(run: Run, common: Sequence[str]) -> Iterator[Drawn]:
    """Every problem's first sample, every one's second, …"""
    for k in range(max(len(run.problems[name]) for name in common)):
        for name in common:
            if k < len(run.problems[name]):
                yield run.problems[name][k]


class _Part:
    """The samples of a run that are compared.

    Attributes:
        sums: by name, one for each of N problems, [N] float64. problems: 1. samples; sampled: 1 where it has any.
            accepted; covered: 1 where it has any of them. rate: accepted of its samples. tokens, accepted_tokens,
            passes. Of accepted samples, known: tokens of those with a log-probability, logprob: its sum; judged: those
            known to be surprising or not, surprising: those that are; kl_known and kl: likewise; with_equations: those
            with an equation, sound: those where all are true.
        k_of_n: (accepted, samples): problems.
    """

    def __init__(self, run: Run, common: Sequence[str], cost: Cost | None, budget: int | None):
        kept, spent = set(), 0
        for sample in _rounds(run, common):
            spent += 0 if cost is None else cost(sample)
            if budget is not None and spent > budget:
                break
            kept.add(sample.order[2])
        lists = [[s for s in run.problems[name] if s.order[2] in kept] for name in common]
        self.k_of_n = Counter((sum(s.accepted for s in samples), len(samples)) for samples in lists)
        good = [[s for s in samples if s.accepted] for samples in lists]
        known = [[s for s in samples if s.logprob is not None] for samples in good]
        with_kl = [[s for s in samples if s.kl is not None] for samples in good]
        judged = [[s for s in samples if s.surprising is not None] for samples in good]
        columns = {
            "problems": [1] * len(lists),
            "samples": [len(samples) for samples in lists],
            "sampled": [bool(samples) for samples in lists],
            "accepted": [len(samples) for samples in good],
            "covered": [bool(samples) for samples in good],
            "rate": [len(a) / len(b) if b else 0.0 for a, b in zip(good, lists, strict=True)],
            "tokens": [sum(s.tokens for s in samples) for samples in lists],
            "accepted_tokens": [sum(s.tokens for s in samples) for samples in good],
            "passes": [sum(s.passes for s in samples) for samples in lists],
            "known": [sum(s.tokens for s in samples) for samples in known],
            "logprob": [math.fsum(s.tokens * (s.logprob or 0.0) for s in samples) for samples in known],
            "kl_known": [sum(s.tokens for s in samples) for samples in with_kl],
            "kl": [math.fsum(s.tokens * (s.kl or 0.0) for s in samples) for samples in with_kl],
            "with_equations": [sum(s.equations is not None for s in samples) for samples in good],
            "sound": [sum(bool(s.equations) for s in samples) for samples in good],
            "judged": [len(samples) for samples in judged],
            "surprising": [sum(bool(s.surprising) for s in samples) for samples in judged],
        }
        self.sums = {name: np.array(values, np.float64) for name, values in columns.items()}

    def totals(self) -> Sums:
        return {name: values.sum() for name, values in self.sums.items()}

    def figures(self) -> dict[str, Any]:
        total = self.totals()
        return {
            "samples": int(total["samples"]),
            "accepted": int(total["accepted"]),
            "accepted_share": _share(total["accepted"], total["samples"]),
            "covered": int(total["covered"]),
            "covered_share": _share(total["covered"], total["problems"]),
            "accepted_of_samples": [
                {"accepted": k, "samples": n, "problems": count} for (k, n), count in sorted(self.k_of_n.items())
            ],
            "mean_rate": _finite(_quantity("mean_rate", total)),
            "tokens": int(total["tokens"]),
            "accepted_tokens": int(total["accepted_tokens"]),
            "passes": int(total["passes"]),
            "accepted_per_1000_passes": _finite(_quantity("accepted_per_1000_passes", total)),
            "student_logprob": _finite(_quantity("student_logprob", total)),
            "kl_to_student": _finite(_quantity("kl_to_student", total)),
            "with_equations": int(total["with_equations"]),
            "sound": int(total["sound"]),
            "surprising": int(total["surprising"]) if total["judged"] else None,
            "surprising_share": _share(total["surprising"], total["judged"]),
        }


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _share(count: Any, of: Any) -> dict[str, float] | None:
    if not of:
        return None
    low, high = wilson(int(count), int(of))
    return {"value": float(count / of), "low": low, "high": high}


def _resampled(parts: Sequence[_Part], seed: int) -> list[dict[str, np.ndarray]]:
    """The sums of each part over problems that are drawn with replacement, the same ones for all: by name,
    [RESAMPLES]."""
    names = list(parts[0].sums)
    columns = np.stack([part.sums[name] for part in parts for name in names], axis=1)  # [problems, parts · names]
    problems = len(columns)
    generator = np.random.default_rng(seed)
    chunks = []
    for start in range(0, RESAMPLES, CHUNK):
        size = min(CHUNK, RESAMPLES - start)
        chunks.append(generator.multinomial(problems, np.full(problems, 1 / problems), size=size) @ columns)
    sums = np.concatenate(chunks).reshape(RESAMPLES, len(parts), len(names))
    return [dict(zip(names, sums[:, i].T, strict=True)) for i in range(len(parts))]


Sums = dict[str, np.ndarray]
_ENDS = [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)]
_QUANTITIES: dict[str, tuple[str, str, float]] = {
    "covered_share": ("covered", "problems", 1.0),
    "mean_rate": ("rate", "sampled", 1.0),
    "accepted_per_1000_passes": ("accepted", "passes", 1000.0),
    "student_logprob": ("logprob", "known", 1.0),
    "kl_to_student": ("kl", "kl_known", 1.0),
    "surprising_share": ("surprising", "judged", 1.0),
}
"""Name: (sum over problems, of which sum it is a share, times)."""


def _difference(a: _Part, b: _Part, of_a: Sums, of_b: Sums) -> dict[str, Any]:
    """Of a and b, first minus second.

    Args:
        of_a, of_b: their sums in each resample.
    """
    only_a = int((a.sums["covered"] > b.sums["covered"]).sum())
    only_b = int((b.sums["covered"] > a.sums["covered"]).sum())
    found: dict[str, Any] = {}
    for name in _QUANTITIES:
        value = _quantity(name, a.totals()) - _quantity(name, b.totals())
        spread = _quantity(name, of_a) - _quantity(name, of_b)
        if not np.isfinite(value) or not np.isfinite(spread).any():
            found[name] = None
            continue
        low, high = np.nanpercentile(spread, _ENDS)
        found[name] = {"value": float(value), "low": float(low), "high": float(high)}
    return found | {"covered_by_one_alone": [only_a, only_b], "mcnemar_p": mcnemar(only_a, only_b)}


def _interval(name: str, sums: Sums) -> list[float] | None:
    """Of one run, over the resamples in which there is something; None without any."""
    spread = _quantity(name, sums)
    return [float(end) for end in np.nanpercentile(spread, _ENDS)] if np.isfinite(spread).any() else None


def _quantity(name: str, sums: Sums) -> np.ndarray:
    """NaN where there is nothing that it is a share of."""
    value, of, times = _QUANTITIES[name]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(sums[of] > 0, times * sums[value] / sums[of], np.nan)


def write_comparison(result: dict[str, Any], path: Path) -> None:
    """As JSON, without NaN."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
