"""What docs/proof.md, the README and the guide conclude is what the result lines say."""

from __future__ import annotations

import re
import statistics

from bench.proof.analysis import bits, judge, untrained
from bench.proof.hypotheses import HYPOTHESES
from bench.proof.lines import FOLDER, Line, read
from bench.proof.page import PAGE
from bench.proof.scales import SCALES

LINES = read(FOLDER / "cpu.jsonl")
VERDICTS = {each.name: judge(each, LINES) for each in HYPOTHESES}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def section() -> str:
    text = PAGE.read_text(encoding="utf-8")
    return " ".join(text.partition("## What came of it")[2].partition("## Tasks")[0].split())


def of(arm: str, kind: str = "train", task: str = "one-step", level: str = "passes", round: int = 0) -> list[Line]:
    wanted = {"kind": kind, "task": task, "arm": arm, "level": level, "round": round}
    found = [line for line in LINES if all(line[name] == value for name, value in wanted.items())]
    assert len(found) == 3, wanted
    return found


def mean(name: str, arm: str) -> str:
    return f"{statistics.mean(line[name] for line in of(arm, 'data')):,.0f}"


def solved(arm: str, task: str = "one-step", level: str = "passes") -> str:
    return _solved(of(arm, task=task, level=level))


def after(round: int, arm: str) -> str:
    return _solved(of(arm, "rounds", "skilled", "all", round))


def _solved(lines: list[Line]) -> str:
    return f"{100 * sum(line['solved'] for line in lines) / sum(line['held_out'] for line in lines):.1f} %"


def follow(arm: str) -> str:
    return _percent(bits(line["followed_problems"]).mean() for line in of(arm, task="rule", level="tokens"))


def retained(arm: str) -> str:
    before = untrained(LINES, "rule")
    assert before is not None
    kept = bits(before["solved_problems"]) == 1
    return _percent(bits(line["solved_problems"])[kept].mean() for line in of(arm, task="rule", level="tokens"))


def sound(arm: str) -> str:
    return _percent(line["sound"] / line["accepted"] for line in of(arm, "data"))


def surprise(arm: str) -> str:
    lines = of(arm, "data")
    return f"{100 * sum(line['surprises'] for line in lines) / sum(line['surprises_of'] for line in lines):.0f} %"


def _percent(values) -> str:
    return f"{100 * statistics.mean(values):.0f} %"


def test_verdicts():
    text = section()
    said = re.findall(r"\((H\d+), (supported|contradicted|not decided)", text)
    assert {name for name, _ in said} == set(VERDICTS)
    assert all(VERDICTS[name].state == state for name, state in said)
    yes, no, open_ = (
        NUMBERS[sum(each.state == state for each in VERDICTS.values())]
        for state in ("supported", "contradicted", "not decided")
    )
    assert f"Of twelve comparisons {yes} are supported, {no} is contradicted, and {open_} are not decided" in text
    widths = [100 * (each.high - each.low) for each in VERDICTS.values() if each.state == "not decided"]
    assert f"{min(widths):.0f} to {max(widths):.0f} points wide" in text


def test_figures():
    text = section()
    sounder, before = VERDICTS["H5"], untrained(LINES, "one-step")
    assert before is not None
    assert all(value is not None for value in (sounder.difference, sounder.low, sounder.high))
    for each in (
        f"after one round {after(1, 'mix-kl')} solved, with the student's own prefixes {after(1, 'own-kl')} (H8",
        f"after three {after(3, 'mix-kl')} and {after(3, 'own-kl')} (H9",
        f"comes as far: {after(3, 'mix-sft')} (H10",
        f"{mean('covered', 'mix')} of 64, rejection sampling {mean('covered', 'rs')} (H1",
        f"+{100 * sounder.difference:.1f} points at equal tokens, −{-100 * sounder.low:.1f} to "
        f"+{100 * sounder.high:.1f} (H5",
        f"{solved('rs')}, with the mixture {solved('mix')} (H2",
        f"{sound('rs')} of its samples are sound, {sound('mix')} of the mixture's",
        f"{solved('reference')}, the mixture {solved('mix')} (H7",
        f"at equal tokens {solved('reference', level='tokens')} and {solved('mix', level='tokens')} |",
        f"{mean('covered', 'star')} of 64 at {mean('passes', 'star')} passes",
        f"{sound('star')} of the samples are sound, {surprise('star')} have a surprise, and they taught "
        f"{solved('star')}",
        f"{follow('teacher')} of the answers follow the rule afterwards, {follow('mix')} with the mixture's (H11",
        f"keeps {retained('mix')} of what it solved, the other {retained('teacher')} (H12",
        f"{solved('reference', 'two-step')} of the held-out problems after worked solutions, "
        f"{solved('star', 'two-step')} after rationalisation, {solved('mix', 'two-step')} after the mixture (H3",
        f"{mean('accepted', 'shuffled')} accepted samples of {mean('covered', 'shuffled')} problems taught as much, "
        f"{solved('shuffled')} (H6",
        f"a right sample of {mean('covered', 'escalation')} of 64 problems at the passes at which the mixture finds "
        f"one of {mean('covered', 'mix')} (H4",
        f"{sound('escalation')} sound and {surprise('escalation')} with a surprise, where the mixture has "
        f"{sound('mix')} and {surprise('mix')}",
        f"the teacher's harm: {solved('teacher')} solved after them, {_solved([before])} before",
        f"0.1 and 0.5 nats taught {solved('budget-0.1')} and {solved('budget-0.5')}",
        f"`surprise` the mixture taught {solved('mix-nospike')}, with `equations` {solved('mix-sound')}",
        f"twice, came to {solved('shuffled')} and {solved('shuffled', level='tokens')}",
        f"in {NUMBERS[SCALES['cpu'].steps]} steps",
    ):
        assert each in text, each


def test_what_other_pages_say_of_it():
    readme, guide = (
        " ".join((PAGE.parents[1] / name).read_text(encoding="utf-8").split())
        for name in ("README.md", "docs/distillation_guide.md")
    )
    covered = f"{mean('covered', 'mix')} of 64 problems"
    for each in (
        f"{after(1, 'mix-kl')} solved after one, {after(1, 'own-kl')} from the student's own prefixes",
        f"{covered}, rejection sampling of {mean('covered', 'rs')}",
        f"{solved('reference')}, the mixture {solved('mix')}",
        f"{follow('teacher')} follow it, {follow('mix')} of the mixture's",
    ):
        assert each in readme, each
    more = VERDICTS["H1"]
    assert more.difference is not None and more.low is not None and more.high is not None
    for each in (
        f"{covered} and rejection sampling of {mean('covered', 'rs')} (+{100 * more.difference:.1f} points, "
        f"{100 * more.low:.1f} to {100 * more.high:.1f})",
        f"{solved('mix')} and {solved('rs')} of the held-out problems",
        f"of {mean('covered', 'escalation')} of 64 problems where `kl_symmetry` alone found one of "
        f"{mean('covered', 'mix')}",
        f"{surprise('escalation')} instead of {surprise('mix')}",
    ):
        assert each in guide, each
