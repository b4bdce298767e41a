"""Verdicts on hypotheses, of result lines alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from bench.proof.hypotheses import LEAST_SEEDS, MARGIN, Arm, Hypothesis
from bench.proof.lines import Line
from sglang_optimal.distill.intervals import CONFIDENCE, mcnemar

RESAMPLES = 10_000
HELD_OUT = ("solved", "followed", "retained")
"""Metrics of problems that are the same for every seed."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """state: ``supported``, ``contradicted``, ``not decided`` or ``not run yet``. seeds: that both arms have.
    difference, low, high: of the shares, a minus b, with the bootstrap's interval. only_a, only_b: pairs of problem and
    seed in which that arm alone has it; p: McNemar's exact test of them, two-sided."""

    state: str
    seeds: int
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    only_a: int = 0
    only_b: int = 0
    p: float | None = None


def judge(hypothesis: Hypothesis, lines: Sequence[Line]) -> Verdict:
    """Compare two arms, paired by seed and problem.

    The interval is that of a bootstrap (Efron 1979) over seeds and problems: both are drawn with replacement, held-out
    problems once for all seeds, others within their seed. ``more`` is supported where all of the interval lies above 0
    and McNemar's p (1947) is below 0.05, and contradicted where all lies below 0 and p is. ``no less`` is supported
    where all of it lies above −`MARGIN`, contradicted where all lies below. With fewer than `LEAST_SEEDS` seeds, or
    else, it is not decided.
    """
    pairs = [
        (a, b) for seed in sorted({line["seed"] for line in lines})
        if (a := _vector(lines, hypothesis.a, hypothesis.metric, seed)) is not None
        and (b := _vector(lines, hypothesis.b, hypothesis.metric, seed)) is not None
    ]  # fmt: skip
    if not pairs:
        return Verdict("not run yet", 0)
    if any(len(a) != len(b) for a, b in pairs):
        raise ValueError(f"{hypothesis.name}: the arms have other problems in one seed.")
    differences = [a - b for a, b in pairs]
    only_a = int(sum((d > 0).sum() for d in differences))
    only_b = int(sum((d < 0).sum() for d in differences))
    p = mcnemar(only_a, only_b)
    means = resampled(differences, crossed=hypothesis.metric in HELD_OUT)
    low, high = np.percentile(means, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
    state = "not decided" if len(pairs) < LEAST_SEEDS else _state(hypothesis.wanted, float(low), float(high), p)
    value = float(np.mean([d.mean() for d in differences]))
    return Verdict(state, len(pairs), value, float(low), float(high), only_a, only_b, p)


def _state(wanted: str, low: float, high: float, p: float) -> str:
    if wanted == "more":
        below = p < 1 - CONFIDENCE
        return "supported" if low > 0 and below else "contradicted" if high < 0 and below else "not decided"
    assert wanted == "no less"
    return "supported" if low > -MARGIN else "contradicted" if high < -MARGIN else "not decided"


def resampled(differences: Sequence[np.ndarray], *, crossed: bool, seed: int = 0) -> np.ndarray:
    """Means of resampled differences, [RESAMPLES].

    Args:
        differences: of each of S seeds, [P] with values −1, 0 and 1.
        crossed: the problems are the same in every seed, and drawn once for all.
    """
    generator = np.random.default_rng(seed)
    count = len(differences)
    per_seed = np.empty((RESAMPLES, count))
    shared: np.ndarray | None = None
    for i, values in enumerate(differences):
        size = len(values)
        if shared is None or not crossed:
            shared = generator.multinomial(size, np.full(size, 1 / size), size=RESAMPLES)
        per_seed[:, i] = shared @ values / size
    weights = generator.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    return (weights * per_seed).sum(1) / count


def _vector(lines: Sequence[Line], arm: Arm, metric: str, seed: int) -> np.ndarray | None:
    """0 and 1 of each problem; None where there is no such line, or nothing to retain."""
    wanted = {"kind": arm.kind, "task": arm.task, "arm": arm.arm, "level": arm.level, "round": arm.round, "seed": seed}
    line = next((line for line in lines if all(line[k] == v for k, v in wanted.items())), None)
    if line is None:
        return None
    if metric != "retained":
        return bits(line[f"{metric}_problems"])
    before = untrained(lines, arm.task)
    if before is None:
        return None
    kept = bits(line["solved_problems"])[bits(before["solved_problems"]) == 1]
    return kept if len(kept) else None


def untrained(lines: Sequence[Line], task: str) -> Line | None:
    return next((line for line in lines if line["kind"] == "untrained" and line["task"] == task), None)


def bits(text: str) -> np.ndarray:
    """``0110`` as [0, 1, 1, 0]."""
    return np.array([int(each) for each in text])
