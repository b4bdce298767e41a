"""What to look for in a run: checks of its numbers, each with what was measured and what to do."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from sglang_optimal.distill.report.statistics import RARE, Statistics, merged

KL_TOLERANCE = 0.05
ESS_TOLERANCE, ESS_WIDE = 0.1, 3.0
BOUND_SHARE = 0.10
RARE_SHARE, LOW_LOGPROB = 0.02, -2.0
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


def verdicts(statistics: Statistics) -> list[Verdict]:
    """All checks that apply."""
    checks = (_kl_balance, _ess_balance, _bounds, _coverage, _length, _filters, _duplicates, _strategies)
    return [verdict for check in checks if (verdict := check(statistics)) is not None]


def percent(share: float) -> str:
    """Such as ``12 %`` or ``0.3 %``."""
    value = 100 * share
    if value in (0, 100):
        return f"{value:.0f} %"
    if value < 0.1:
        return "under 0.1 %"
    return f"{value:.1f} %".replace(".0 ", " ") if value < 10 or value > 99 else f"{value:.0f} %"


def minus(value: float, form: str) -> str:
    """A number with a typographic minus."""
    return format(value, form).replace("-", "−")


def _mark(good: bool) -> Literal["good", "warn"]:
    return "good" if good else "warn"


def _where(statistics: Statistics) -> str:
    """Words for the tokens that the means of `_kl_balance` and `_ess_balance` are over."""
    if statistics.run.method == "fixed":
        return "over all tokens"
    inner = sum(g.inner_kl["kl_to_student"].count + g.inner_kl["kl_to_student"].skipped for g in statistics.groups)
    return f"over the {percent(inner / statistics.total('known'))} of tokens with α strictly between its bounds"


def _kl_balance(statistics: Statistics) -> Verdict | None:
    title = "KL balance"
    if statistics.has_series:
        names = ("kl_to_student", "kl_to_teacher")
        student, teacher = (merged(*(g.inner_kl[name] for g in statistics.groups)).value for name in names)
        where = _where(statistics)
    else:
        student, teacher = statistics.mean("kl_to_student"), statistics.mean("kl_to_teacher")
        where = "over all tokens, those at a bound of α among them, because single tokens' KLs were not stored"
    if student is None or teacher is None:
        return Verdict("none", title, "No KLs are stored of tokens with α strictly between its bounds.")
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
    method = statistics.run.method
    if method not in (None, "kl_symmetry"):
        return Verdict("none", title, f"{measured} {_named(method)} does not ask for equal KLs.")
    if not statistics.has_series:
        return Verdict("none", title, f"{measured} kl_symmetry makes them equal between the bounds only.")
    good = abs(ratio - 1) <= KL_TOLERANCE
    default = "" if method else ", the server's usual method,"
    advice = f"kl_symmetry{default} makes them equal; amber outside 1 ± {KL_TOLERANCE}."
    if not good:
        advice += " Check that the server used this method, and that its student is the one that you mean."
    return Verdict(_mark(good), title, f"{measured} {advice}")


def _ess_balance(statistics: Statistics) -> Verdict | None:
    title = "ESS balance"
    log_ess = merged(*(g.inner_log_ess for g in statistics.groups)).value
    if log_ess is None:
        return Verdict("none", title, "ESS ratios of single tokens are not stored.")
    ratio = math.exp(log_ess)
    measured = (
        f"The ESS ratio, student to teacher, is {ratio:.3f} (geometric mean {_where(statistics)}); 1 is balanced."
    )
    if statistics.run.method == "ess_balance":
        good = abs(ratio - 1) <= ESS_TOLERANCE
        advice = f"ess_balance makes it 1; amber outside 1 ± {ESS_TOLERANCE}."
        if not good:
            advice += " Check that the server used this method."
    else:
        good = 1 / ESS_WIDE <= ratio <= ESS_WIDE
        advice = f"Amber outside 1/{ESS_WIDE:.0f} to {ESS_WIDE:.0f}, where q is a far better proposal for one model."
        if not good:
            advice += " If importance weights matter to you, try alpha_method: ess_balance."
    return Verdict(_mark(good), title, f"{measured} {advice}")


def _bounds(statistics: Statistics) -> Verdict | None:
    run, count = statistics.run, sum(g.alpha.count for g in statistics.groups)
    title = "α at its bounds"
    if not count:
        return Verdict("none", title, "No α is stored.")
    if run.method == "fixed":
        value = "" if run.fixed_alpha is None else f" at {run.fixed_alpha:g}"
        return Verdict("none", title, f"α was fixed{value} for every token, so it has no bounds.")
    low, high = statistics.total("at_min") / count, statistics.total("at_max") / count
    together = low + high if run.alpha_min < run.alpha_max else low
    good = together <= BOUND_SHARE
    text = (
        f"{percent(low)} of tokens are at α = {run.alpha_min:g} (towards the student) and {percent(high)} at "
        f"{run.alpha_max:g} (towards the teacher); amber above {percent(BOUND_SHARE)} together."
    )
    if not good:
        text += (
            " The bounds decide these tokens, not the method: widen alpha_min and alpha_max, or accept it knowingly."
        )
    return Verdict(_mark(good), title, text)


def _coverage(statistics: Statistics) -> Verdict | None:
    group = statistics.accepted if statistics.accepted.tokens else statistics.rejected
    which = "accepted" if statistics.accepted.tokens else "rejected"
    mean = group.means["student_logprob"].value
    title = "Coverage by the student"
    if mean is None:
        return Verdict("none", title, "Log-probabilities under the student are not stored.")
    good = mean >= LOW_LOGPROB
    text = f"Tokens of {which} samples have log-probability {minus(mean, '.3f')} nats under the student on average"
    if group.known:
        rare = group.rare / group.known
        good &= rare <= RARE_SHARE
        text += f", and {percent(rare)} of them a probability below {RARE:g}"
    text += f". Amber below {minus(LOW_LOGPROB, 'g')} nats"
    text += f" or above {percent(RARE_SHARE)}." if group.known else "."
    if not good:
        text += " The student would hardly write this: lower alpha_max, or shorten what the teacher is told."
    return Verdict(_mark(good), title, text)


def _length(statistics: Statistics) -> Verdict | None:
    share = statistics.total("by_length") / statistics.tally.total
    good = share <= LENGTH_SHARE
    limit = (statistics.run.config.get("sampling") or {}).get("max_new_tokens")
    setting = "sampling.max_new_tokens" + (f" ({limit})" if limit else "")
    text = f"{percent(share)} of samples were cut at {setting}; amber above {percent(LENGTH_SHARE)}."
    if not good:
        text += " Raise it, or refuse such samples with the filter `finish`."
    return Verdict(_mark(good), "Ended by length", text)


def _filters(statistics: Statistics) -> Verdict | None:
    tally, title = statistics.tally, "Filters"
    if not tally.reasons:
        text = "No sample was rejected." + ("" if statistics.run.filters else " The run has no filters.")
        return Verdict("good", title, text)
    by_filter = rejections(statistics)
    name, count = max(by_filter.items(), key=lambda item: item[1])
    share = count / tally.total
    good = share <= FILTER_SHARE and tally.accepted > 0
    reasons = {reason: c for (f, reason), c in tally.reasons.items() if f == name}
    reason = max(reasons, key=reasons.__getitem__)
    who = "The server refuses" if name == "server" else f"The filter `{name}` rejects"
    text = (
        f"{who} most: {count:,} of {tally.total:,} samples ({percent(share)}), usually as "
        f"“{shortened(reason)}”; amber above {percent(FILTER_SHARE)}."
    )
    if not tally.accepted:
        text = "No sample was accepted. " + text
    if not good:
        text += " Read some of its samples below before you keep or loosen it."
    return Verdict(_mark(good), title, text)


def _duplicates(statistics: Statistics) -> Verdict | None:
    filters = (statistics.run.config.get("filters") or []) if statistics.run.config else []
    checked = any(f.get("type") == "deduplicate" for f in filters)
    count = sum(count for (_, reason), count in statistics.tally.reasons.items() if reason == "duplicate")
    if not checked and not count:
        return None
    share = count / statistics.tally.total
    good = share <= DUPLICATE_SHARE
    text = f"{percent(share)} of samples repeat an accepted text; amber above {percent(DUPLICATE_SHARE)}."
    if not good:
        text += " Raise the temperature, lower sampling.n, or add prefix strategies."
    return Verdict(_mark(good), "Duplicates", text)


def _strategies(statistics: Statistics) -> Verdict | None:
    strategies = statistics.tally.strategies
    if len(strategies) < 2:
        return None
    rates = {name: accepted / total for name, (accepted, total) in strategies.items()}
    best, worst = max(rates, key=rates.__getitem__), min(rates, key=rates.__getitem__)
    if rates[best] == rates[worst]:
        return Verdict(
            "good", "Prefix strategies", f"{percent(rates[best])} of samples are accepted with each of them."
        )
    gap = rates[best] - rates[worst]
    # Few samples make wide intervals, and a gap inside them says nothing.
    apart = wilson(*strategies[worst])[1] < wilson(*strategies[best])[0]
    good = gap <= STRATEGY_GAP or not apart
    text = (
        f"`{best}` has {percent(rates[best])} of its samples accepted, `{worst}` {percent(rates[worst])}; amber when "
        f"they are more than {100 * STRATEGY_GAP:.0f} points and their 95 % intervals apart."
    )
    if not good:
        text += f" Drop `{worst}` or rewrite its template; the accepted data leans towards `{best}`."
    return Verdict(_mark(good), "Prefix strategies", text)


def rejections(statistics: Statistics) -> dict[str, int]:
    """Filter: samples that it rejected, in the order of the run's filters; what they do not name comes first."""
    counts: dict[str, int] = {}
    for (name, _), count in statistics.tally.reasons.items():
        counts[name] = counts.get(name, 0) + count
    known = statistics.run.filters
    others = sorted((name for name in counts if name not in known), key=lambda name: -counts[name])
    return {name: counts.get(name, 0) for name in [*others, *known]}


def wilson(successes: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, see https://doi.org/10.1080/01621459.1927.10502953."""
    share = successes / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def shortened(text: str | None, length: int = 120) -> str:
    """One line of at most ``length`` characters."""
    line = " ".join((text or "no reason").split())
    return line if len(line) <= length else line[: length - 1] + "…"


def _named(method: str) -> str:
    return "A fixed α" if method == "fixed" else f"The method {method}"
