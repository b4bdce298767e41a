"""Which setting of a probe to take, by rules that claim no more than the intervals allow.

Two settings are told apart where the 95 % interval of the difference of the shares of problems that they cover (a
bootstrap over problems, paired) has no zero in it, and McNemar's exact test, two-sided, has p < 0.05. The first alone
finds differences too often where few problems are covered by one of them alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from scipy import stats

from sglang_optimal.distill.intervals import CONFIDENCE
from sglang_optimal.distill.wording import minus

MIXTURE = "mixture"
LEVEL = 0.05
"""Of McNemar's test."""
MARGIN = 0.1
"""A share of the problems: a setting that can cover no more than so many beyond what the student alone covers, at the
end of the exact interval (Clopper and Pearson 1934) of those that it alone covers, is not worth its passes."""
LEAST_DISCORDANT = 6
"""Problems that one setting alone must cover, and the other none of those, for p < 0.05: 2 · 2⁻⁶ = 0.031."""


@dataclasses.dataclass(frozen=True)
class Figures:
    """What came of one setting.

    Attributes:
        name, kind: of its `Arm`.
        problems: that all settings have sampled. covered: those with an accepted sample; covered_share: value, and the
            ends of Wilson's interval.
        accepted_of_samples: problems by how many of how many samples were accepted.
        samples, accepted: of them. sound: accepted texts in which all equations are true, or that passed the filter
            `equations`; None where no accepted text has one. with_equations: accepted texts that have any; None with
            that filter. surprising: accepted samples with a surprise; None where it is not known.
        student_logprob, student_logprob_interval, kl_to_student: means over the tokens of accepted samples, nats; None
            where there are none.
        passes: forward passes of the models that it needs: one for a token of the student or teacher alone, two for one
            of a mixture. passes_taken: that the probe took, which is more where a server could not run one alone.
        passes_per_accepted: None without an accepted sample.
    """

    name: str
    kind: str
    problems: int
    covered: int
    covered_share: dict[str, float]
    accepted_of_samples: list[dict[str, int]]
    samples: int
    accepted: int
    sound: int | None
    with_equations: int | None
    surprising: int | None
    student_logprob: float | None
    student_logprob_interval: list[float] | None
    kl_to_student: float | None
    passes: int
    passes_taken: int
    passes_per_accepted: float | None


@dataclasses.dataclass(frozen=True)
class Advice:
    """verdict: ``setting``, ``student`` (rejection sampling is enough), ``teacher`` (its text is better), ``unknown``
    (too few problems to tell) or ``nothing`` (no sample was accepted). name: of the setting to take, if any. title:
    the verdict in words. reason: why."""

    verdict: str
    name: str | None
    title: str
    reason: str


def recommended(arms: Sequence[Figures], differences: Sequence[dict[str, Any]]) -> Advice:
    """Judge a probe.

    The first of these that holds decides; "more" means told apart (see the module), and cheap is measured in forward
    passes an accepted sample.

    1. No sample was accepted: nothing can be said.
    2. No two settings are told apart: too few problems to tell; but where no other setting can cover more than
       `MARGIN` beyond the student alone, rejection sampling is enough.
    3. No mixture covers more than the student alone: if the teacher alone does, its text is better here. Else rejection
       sampling is enough where each mixture covers no more problems in this probe, or cannot cover more than `MARGIN`
       beyond; and there are too few problems to tell where one may.
    4. The cheapest setting that is not told apart from the one that covers most. Without the student alone among the
       settings, rule 3 is left out.

    Args:
        arms: two or more.
        differences: of all pairs, as `sglang_optimal.distill.compare.compare` has them at the level ``all``.
    """
    pairs = {(d["of"], d["minus"]): d for d in differences}
    if not any(arm.accepted for arm in arms):
        return Advice(
            "nothing", None, "No setting has an accepted sample",
            "Nothing can be compared. Read what the filters refused (distill report of one setting), or tell the "
            "teacher more.",
        )  # fmt: skip

    def more(a: Figures, b: Figures) -> bool:
        return _covers_more(pairs, a.name, b.name)

    def best_of(some: Sequence[Figures]) -> Figures:
        return max(some, key=lambda arm: (arm.covered, -_cost(arm)))

    students, teachers, mixtures = (
        [arm for arm in arms if arm.kind == kind] for kind in ("student", "teacher", MIXTURE)
    )
    student = best_of(students) if students else None
    best = best_of(arms)
    apart = any(more(a, b) for a in arms for b in arms if a is not b)
    if not apart:
        most = max((_most_beyond(pairs, arm, student) for arm in arms if student and arm is not student), default=1.0)
        if student is not None and most <= MARGIN:
            return _enough(student, f"no other setting covers more than {most:.0%} of the problems beyond that")
        return _too_few(f"No two settings are told apart{_widest(pairs, best, arms)}", best)
    if student is not None and not any(more(arm, student) for arm in mixtures):
        above = [arm for arm in teachers if more(arm, student)]
        if above:
            teacher = best_of(above)
            return Advice(
                "teacher", teacher.name, "The teacher's text is better here",
                f"{_covers(teacher)}, the student alone {student.covered:,} ({_gain(pairs, teacher, student)}), and no "
                "mixture is told apart from the student. Raise α or the budget further, or train on the teacher's "
                f"text. How likely it is under the student{_logprobs(teacher, student) or ' is not known'}.",
            )  # fmt: skip
        near = [arm for arm in mixtures if arm.covered > student.covered]
        if open_ones := [arm for arm in near if _most_beyond(pairs, arm, student) > MARGIN]:
            first = best_of(open_ones)
            return _too_few(
                f"{first.name} may cover more than the student alone ({_gain(pairs, first, student)})", first
            )
        return _enough(student, f"no mixture is shown to cover more{_widest(pairs, student, mixtures)}")
    tied = [arm for arm in arms if not more(best, arm)]
    chosen = min(tied, key=_cost)
    reason = f"{_covers(chosen)} at {_cost(chosen):,.0f} passes an accepted sample"
    if chosen is not best:
        reason += (
            f", the cheapest of {len(tied)} that are not told apart from {best.name}, which covers most "
            f"({best.covered:,}; {_gain(pairs, best, chosen)})"
        )
    elif len(tied) > 1:
        reason += f", the most of all, and the cheapest of {len(tied)} that are not told apart"
    else:
        reason += ", more than any other setting"
    if student is not None and chosen is not student:
        reason += f". The student alone covers {student.covered:,} ({_gain(pairs, chosen, student)})"
    reason += "."
    near = [arm for arm in tied if arm.kind == MIXTURE]
    if chosen.kind == "teacher" and near:
        mixture = min(near, key=_cost)
        reason += (
            f" Its text is not the student's{_logprobs(chosen, mixture)}: {mixture.name} is the cheapest mixture that "
            f"is not told apart ({_covers(mixture)}, {_cost(mixture):,.0f} passes an accepted sample)."
        )
    return Advice("setting", chosen.name, f"Take {chosen.name}", reason)


def _too_few(what: str, arm: Figures) -> Advice:
    return Advice(
        "unknown", None, "Too few problems to tell",
        f"{what}, on {arm.problems:,} problems. To be told apart a setting must cover at least {LEAST_DISCORDANT} "
        "problems that the other does not. Give more --problems; the same command goes on with them.",
    )  # fmt: skip


def _enough(student: Figures, why: str) -> Advice:
    return Advice(
        "student", student.name, "Rejection sampling is enough here",
        f"{_covers(student)} with the student alone, and {why}. Sample the student alone, more often where it has no "
        "right answer yet.",
    )  # fmt: skip


def _difference(pairs: dict[tuple[str, str], dict[str, Any]], a: str, b: str) -> dict[str, float]:
    """Of the shares of problems covered, a minus b."""
    if (a, b) in pairs:
        return pairs[a, b]["covered_share"]
    turned = pairs[b, a]["covered_share"]
    return {"value": -turned["value"], "low": -turned["high"], "high": -turned["low"]}


def _most_beyond(pairs: dict[tuple[str, str], dict[str, Any]], a: Figures, b: Figures) -> float:
    """Upper end of the exact interval of the share of problems that a covers and b does not."""
    of = (a.name, b.name)
    alone = pairs[of]["covered_by_one_alone"][0] if of in pairs else pairs[of[::-1]]["covered_by_one_alone"][1]
    return float(stats.binomtest(alone, a.problems).proportion_ci(CONFIDENCE, method="exact").high)


def _covers_more(pairs: dict[tuple[str, str], dict[str, Any]], a: str, b: str) -> bool:
    """Whether a is told apart from b, and covers more."""
    if a == b:
        return False
    p = (pairs.get((a, b)) or pairs[b, a])["mcnemar_p"]
    return _difference(pairs, a, b)["low"] > 0 and p < LEVEL


def _cost(arm: Figures) -> float:
    return math.inf if arm.passes_per_accepted is None else arm.passes_per_accepted


def _covers(arm: Figures) -> str:
    return f"{arm.name} covers {arm.covered:,} of {arm.problems:,} problems"


def _gain(pairs: dict[tuple[str, str], dict[str, Any]], a: Figures, b: Figures) -> str:
    found = _difference(pairs, a.name, b.name)
    value, low, high = (minus(100 * found[key], "+.1f") for key in ("value", "low", "high"))
    return f"{value} points, {low} to {high}"


def _widest(pairs: dict[tuple[str, str], dict[str, Any]], arm: Figures, others: Sequence[Figures]) -> str:
    """The interval of the difference that leaves most room."""
    rest = [other for other in others if other is not arm]
    if not rest:
        return ""
    widest = max(rest, key=lambda other: _spread(_difference(pairs, other.name, arm.name)))
    return f" ({widest.name} minus {arm.name}: {_gain(pairs, widest, arm)})"


def _spread(interval: dict[str, float]) -> float:
    return interval["high"] - interval["low"]


def _logprobs(a: Figures, b: Figures) -> str:
    if a.student_logprob is None or b.student_logprob is None:
        return ""
    return f" ({minus(a.student_logprob, '.2f')} nats a token, {b.name} {minus(b.student_logprob, '.2f')})"
