"""What to look for in a run: checks of its numbers, each with what was measured and what to do."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from sglang_optimal.distill.intervals import more_often, wilson
from sglang_optimal.distill.report.statistics import KLS, SEVERAL, RunInfo, Statistics
from sglang_optimal.distill.surprise import LEAP, RARE
from sglang_optimal.distill.wording import minus, percent

KL_TOLERANCE = 0.05
ESS_TOLERANCE, ESS_WIDE = 0.1, 3.0
BOUND_SHARE = 0.10
LOW_LOGPROB = -2.0
SURPRISE_SHARE = 0.10
COVERED_SHARE = 0.50
LENGTH_SHARE = 0.05
FILTER_SHARE = 0.30
DUPLICATE_SHARE = 0.10
STRATEGY_GAP = 0.20


@dataclasses.dataclass(frozen=True)
class Verdict:
    """mark: ``good``, ``look`` (amber), or ``none`` when there is nothing to judge by."""

    mark: Literal["good", "warn", "none"]
    title: str
    text: str


@dataclasses.dataclass(frozen=True)
class Headline:
    """What came of the run in a sentence, and what to do next. mark: as of a `Verdict`."""

    mark: Literal["good", "warn"]
    text: str
    next_step: str


def headline(statistics: Statistics) -> Headline:
    """What a reader should know first."""
    tally, accepted = statistics.tally, statistics.accepted
    problems = len(tally.problems)
    text = f"{tally.accepted:,} of {tally.total:,} accepted, {tally.covered:,} of {problems:,} problems covered"
    share = accepted.surprising / accepted.judged if accepted.judged else 0.0
    if accepted.judged:
        text += f", {percent(share)} of the accepted have a surprise"
    run = statistics.run
    # Of an escalation it is known at its end alone how many samples there are.
    unfinished = run.states != {"complete"} if run.steps else tally.total < run.planned
    begun = f"So far: {text}." if unfinished else f"{text}."
    if not tally.accepted:
        name = max(by_filter, key=by_filter.__getitem__) if (by_filter := rejections(statistics)) else None
        return Headline("warn", begun, f"Nothing to train on yet: read what `{name}` refused, below.")
    if share > SURPRISE_SHARE:
        return Headline(
            "warn", begun,
            "Filter them before training (`surprise`), or read them first, below: a leap to the answer, or a slip that "
            "the teacher put right?",
        )  # fmt: skip
    if tally.covered < COVERED_SHARE * problems:
        return Headline(
            "warn", begun,
            f"{problems - tally.covered:,} problems have no accepted sample: raise `sampling.n`, or tell the teacher "
            "more, before training.",
        )  # fmt: skip
    if unfinished:
        return Headline("good", begun, "The run is not complete: the same command goes on.")
    return Headline("good", begun, "Read a few samples below, then write them for a trainer: `distill export`.")


def judge(statistics: Statistics) -> list[Verdict]:
    """All checks of the data that apply."""
    checks = (
        _surprises, _leaps, _filtering, _covered, _coverage, _bounds, _length, _filters, _duplicates, _strategies,
    )  # fmt: skip
    return [verdict for check in checks if (verdict := check(statistics)) is not None]


def self_check(statistics: Statistics) -> list[Verdict]:
    """Checks of what the method makes true by construction: of the servers, not of the data."""
    return [_kl_balance(statistics), _ess_balance(statistics)]


def _judged(title: str, good: bool, text: str, advice: str) -> Verdict:
    """``advice`` is for what is not good."""
    return Verdict("good", title, text) if good else Verdict("warn", title, f"{text} {advice}")


def _where(statistics: Statistics) -> str:
    """Words for the tokens that the means of `_kl_balance` and `_ess_balance` are over."""
    if statistics.run.method in ("fixed", SEVERAL):
        return "over all tokens"
    share = percent(statistics.inner_tokens / statistics.known)
    return f"over the {share} of tokens with α strictly between its bounds"


def _kl_balance(statistics: Statistics) -> Verdict:
    title, method = "KL balance", statistics.run.method
    means = statistics.inner if statistics.known else statistics.means
    student, teacher = (means[name].value for name in KLS)
    if student is None or teacher is None:
        return Verdict("none", title, "No KLs are stored of tokens with α strictly between its bounds.")
    if statistics.known:
        where = _where(statistics)
    else:
        where = "over all tokens, those at a bound of α among them, because single tokens' KLs were not stored"
    if min(student, teacher) < 1e-9:
        return Verdict(
            "none", title,
            f"KL(q‖student) is {student:.2g} and KL(q‖teacher) {teacher:.2g} nats {where}: "
            "one of them is zero, so there is no ratio.",
        )  # fmt: skip
    ratio = student / teacher
    measured = (
        f"KL(q‖student) is {student:.4f} nats and KL(q‖teacher) {teacher:.4f} nats on average {where}: "
        f"ratio {ratio:.3f}."
    )
    if statistics.run.kl_budget is not None and statistics.known:
        return _kl_budget(statistics.run, student, teacher, where)
    if method not in (None, "kl_symmetry"):
        names = {"fixed": "A fixed α", SEVERAL: "A run with different settings of α"}
        name = names.get(str(method), f"The method {method}")
        return Verdict("none", title, f"{measured} {name} does not ask for equal KLs.")
    if not statistics.known:
        return Verdict("none", title, f"{measured} kl_symmetry makes them equal between the bounds only.")
    default = "" if method else ", the server's usual method,"
    return _judged(
        title, abs(ratio - 1) <= KL_TOLERANCE,
        f"{measured} kl_symmetry{default} makes them equal; amber outside 1 ± {KL_TOLERANCE}.",
        "Check that the server used this method, and that its student is the one that you mean.",
    )  # fmt: skip


def _kl_budget(run: RunInfo, student: float, teacher: float, where: str) -> Verdict:
    """Between the bounds each token uses up its budget."""
    budget = run.kl_budget or 0.0
    side, value = ("teacher", teacher) if run.method == "kl_budget_teacher" else ("student", student)
    return _judged(
        "KL budget", abs(value - budget) <= KL_TOLERANCE * budget,
        f"KL(q‖{side}) is {value:.4f} nats on average {where}; {run.method} makes it {budget:g}, amber more than "
        f"{percent(KL_TOLERANCE)} off.",
        "Check that the server used this method, and that its student is the one that you mean.",
    )  # fmt: skip


def _ess_balance(statistics: Statistics) -> Verdict:
    title, log_ess = "ESS balance", statistics.inner["log_ess"].value
    if log_ess is None:
        return Verdict("none", title, "ESS ratios of single tokens are not stored.")
    ratio = math.exp(log_ess)
    measured = (
        f"The ESS ratio, student to teacher, is {ratio:.3f} (geometric mean {_where(statistics)}); 1 is balanced."
    )
    if statistics.run.method == "ess_balance":
        return _judged(
            title, abs(ratio - 1) <= ESS_TOLERANCE,
            f"{measured} ess_balance makes it 1; amber outside 1 ± {ESS_TOLERANCE}.",
            "Check that the server used this method.",
        )  # fmt: skip
    wide = f"{ESS_WIDE:.0f}"
    return _judged(
        title, 1 / ESS_WIDE <= ratio <= ESS_WIDE,
        f"{measured} Amber outside 1/{wide} to {wide}, where q is a far better proposal for one model.",
        "If importance weights matter to you, try alpha_method: ess_balance.",
    )  # fmt: skip


def _bounds(statistics: Statistics) -> Verdict:
    run, count, title = statistics.run, statistics.means["alpha"].count, "α at its bounds"
    if not count:
        return Verdict("none", title, "No α is stored.")
    if run.method == "fixed":
        value = "" if run.fixed_alpha is None else f" at {run.fixed_alpha:g}"
        return Verdict("none", title, f"α was fixed{value} for every token, so it has no bounds.")
    if run.method == SEVERAL:
        of = "steps" if run.steps else "runs that were merged"
        return Verdict("none", title, f"The {of} have different settings of α.")
    low, high = statistics.at_min / count, statistics.at_max / count
    together = low + high if run.alpha_min < run.alpha_max else low
    if run.kl_budget is not None:
        # At 0 and 1 one model itself is within its budget, or the budget is 0: the method decides there.
        together = (low if run.alpha_min > 0 else 0.0) + (high if run.alpha_max < 1 else 0.0)
    return _judged(
        title, together <= BOUND_SHARE,
        f"{percent(low)} of tokens are at α = {run.alpha_min:g} (towards the student) and {percent(high)} at "
        f"{run.alpha_max:g} (towards the teacher); amber above {percent(BOUND_SHARE)} together.",
        "The bounds decide these tokens, not the method: widen alpha_min and alpha_max, or accept it knowingly.",
    )  # fmt: skip


def _surprises(statistics: Statistics) -> Verdict:
    group, title = statistics.accepted, "Surprises"
    if not group.judged:
        nothing = "No sample was accepted." if not statistics.tally.accepted else "Log-probabilities are not stored."
        return Verdict("none", title, nothing)
    share = group.surprising / group.judged
    return _judged(
        title, share <= SURPRISE_SHARE,
        f"{group.surprising:,} of {group.judged:,} accepted samples ({percent(share)}) have a token to which the "
        f"student gives less than {RARE:g}; amber above {percent(SURPRISE_SHARE)}.",
        "They come first below. The filter `surprise` drops them.",
    )  # fmt: skip


def _leaps(statistics: Statistics) -> Verdict | None:
    group, title = statistics.accepted, "Leaps to the answer"
    if not group.answered:
        return None
    share = group.leaps / group.answered
    known = "" if group.answered == statistics.tally.accepted else " that are known to write it"
    return _judged(
        title, share <= SURPRISE_SHARE,
        f"In {group.leaps:,} of {group.answered:,} accepted samples{known} ({percent(share)}) the student gives the "
        f"answer less than {LEAP:g} where it first stands; amber above {percent(SURPRISE_SHARE)}.",
        "A jump, or a slip of the student's that was put right: the filter `equations` refuses the jumps alone.",
    )  # fmt: skip


def _filtering(statistics: Statistics) -> Verdict | None:
    accepted, rejected = statistics.groups
    if not accepted.judged or not rejected.judged:
        return None
    title, of_accepted = "What filtering did", accepted.surprising / accepted.judged
    of_rejected = rejected.surprising / rejected.judged
    tokens = accepted.student_logprob.total, rejected.student_logprob.total
    shares = [group.rare / total if total else 0.0 for group, total in zip(statistics.groups, tokens, strict=True)]
    more = more_often((accepted.surprising, accepted.judged), (rejected.surprising, rejected.judged))
    if all(tokens):
        more = more or more_often((accepted.rare, tokens[0]), (rejected.rare, tokens[1]))
        of_tokens = f", {percent(shares[0])} of accepted and {percent(shares[1])} of rejected tokens are one"
    else:
        of_tokens = ""
    return _judged(
        title, not more,
        f"{percent(of_accepted)} of accepted and {percent(of_rejected)} of rejected samples have a surprise{of_tokens};"
        " amber where the accepted have more than chance explains (95 %).",
        "The filters pick the samples that were led: being right is not being likely. Add the filter `surprise`.",
    )  # fmt: skip


def _covered(statistics: Statistics) -> Verdict:
    tally = statistics.tally
    problems, share = len(tally.problems), tally.covered / len(tally.problems)
    most = max(tally.k_of_n)
    some = f"; at most {most:,} samples of one" if most > 1 else ""
    return _judged(
        "Problems covered", share >= COVERED_SHARE,
        f"{tally.covered:,} of {problems:,} problems ({percent(share)}) have an accepted sample{some}; amber below "
        f"{percent(COVERED_SHARE)}.",
        "Training would see the easy ones alone: raise sampling.n, or tell the teacher more.",
    )  # fmt: skip


def _coverage(statistics: Statistics) -> Verdict:
    accepted = statistics.tally.accepted_tokens > 0
    group, which = (statistics.accepted, "accepted") if accepted else (statistics.rejected, "rejected")
    mean, known, title = group.logprob.value, group.student_logprob.total, "Coverage by the student"
    if mean is None:
        return Verdict("none", title, "Log-probabilities under the student are not stored.")
    measured = f"Tokens of {which} samples have log-probability {minus(mean, '.3f')} nats under the student on average"
    amber = f"Amber below {minus(LOW_LOGPROB, 'g')} nats"
    if known:
        measured += f", and {percent(group.rare / known)} of them a probability below {RARE:g}"
    return _judged(
        title, mean >= LOW_LOGPROB, f"{measured}. {amber}.",
        "The student would hardly write this: lower alpha_max, or shorten what the teacher is told.",
    )  # fmt: skip


def _length(statistics: Statistics) -> Verdict:
    share = statistics.by_length / statistics.tally.total
    limit = (statistics.run.config.get("sampling") or {}).get("max_new_tokens")
    setting = "sampling.max_new_tokens" + (f" ({limit})" if limit else "")
    return _judged(
        "Ended by length", share <= LENGTH_SHARE,
        f"{percent(share)} of samples were cut at {setting}; amber above {percent(LENGTH_SHARE)}.",
        "Raise it, or refuse such samples with the filter `finish`.",
    )  # fmt: skip


def _filters(statistics: Statistics) -> Verdict:
    tally, title = statistics.tally, "Filters"
    if not tally.reasons:
        text = "No sample was rejected." + ("" if statistics.run.filters else " The run has no filters.")
        return Verdict("good", title, text)
    by_filter = rejections(statistics)
    name = max(by_filter, key=by_filter.__getitem__)
    count, share = by_filter[name], by_filter[name] / tally.total
    reason = max((key for key in tally.reasons if key[0] == name), key=tally.reasons.__getitem__)[1]
    who = "The server refuses" if name == "server" else f"The filter `{name}` rejects"
    return _judged(
        title, share <= FILTER_SHARE and tally.accepted > 0,
        ("" if tally.accepted else "No sample was accepted. ")
        + f"{who} most: {count:,} of {tally.total:,} samples ({percent(share)}), usually as "
        f"“{shortened(reason)}”; amber above {percent(FILTER_SHARE)}.",
        "Read some of its samples below before you keep or loosen it.",
    )  # fmt: skip


def _duplicates(statistics: Statistics) -> Verdict | None:
    checked = any(f.get("type") == "deduplicate" for f in statistics.run.config.get("filters") or [])
    count = sum(count for (_, reason), count in statistics.tally.reasons.items() if reason == "duplicate")
    if not checked and not count:
        return None
    share = count / statistics.tally.total
    return _judged(
        "Duplicates", share <= DUPLICATE_SHARE,
        f"{percent(share)} of samples repeat an accepted text; amber above {percent(DUPLICATE_SHARE)}.",
        "Raise the temperature, lower sampling.n, or add prefix strategies.",
    )  # fmt: skip


def _strategies(statistics: Statistics) -> Verdict | None:
    strategies, title = statistics.tally.strategies, "Prefix strategies"
    if len(strategies) < 2:
        return None
    rates = {name: accepted / total for name, (accepted, total) in strategies.items()}
    best, worst = max(rates, key=rates.__getitem__), min(rates, key=rates.__getitem__)
    if rates[best] == rates[worst]:
        return Verdict("good", title, f"{percent(rates[best])} of samples are accepted with each of them.")
    # Few samples make wide intervals, and a gap inside them says nothing.
    apart = wilson(*strategies[worst])[1] < wilson(*strategies[best])[0]
    return _judged(
        title, rates[best] - rates[worst] <= STRATEGY_GAP or not apart,
        f"`{best}` has {percent(rates[best])} of its samples accepted, `{worst}` {percent(rates[worst])}; amber when "
        f"they are more than {100 * STRATEGY_GAP:.0f} points and their 95 % intervals apart.",
        f"Drop `{worst}` or rewrite its template; the accepted data leans towards `{best}`.",
    )  # fmt: skip


def rejections(statistics: Statistics) -> dict[str, int]:
    """Filter: samples that it rejected, in the order of the run's filters; what they do not name comes first."""
    counts: dict[str, int] = {}
    for (name, _), count in statistics.tally.reasons.items():
        counts[name] = counts.get(name, 0) + count
    known = statistics.run.filters
    others = sorted((name for name in counts if name not in known), key=lambda name: -counts[name])
    return {name: counts.get(name, 0) for name in [*others, *known]}


def shortened(text: str | None, length: int = 120) -> str:
    """One line of at most ``length`` characters."""
    line = " ".join((text or "no reason").split())
    return line if len(line) <= length else line[: length - 1] + "…"
