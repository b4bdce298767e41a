"""What docs/proof.md, the README and the guide conclude is what the result lines say."""

from __future__ import annotations

import re

from bench.proof.analysis import judge
from bench.proof.hypotheses import HYPOTHESES
from bench.proof.lines import FOLDER, read
from bench.proof.page import PAGE
from bench.proof.scales import SCALES

VERDICTS = {each.name: judge(each, read(FOLDER / "cpu.jsonl")) for each in HYPOTHESES}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def section() -> str:
    text = PAGE.read_text(encoding="utf-8")
    return " ".join(text.partition("## What came of it")[2].partition("## Tasks")[0].split())


def tables() -> dict[tuple[str, str, str, str], dict[str, str]]:
    """Rows of the page's tables on CPU cores, which test_proof_page.py holds to the lines, by (task, ``sampled`` or
    ``learnt``, arm, level)."""
    block = PAGE.read_text(encoding="utf-8").partition("<!-- proof:results-cpu -->")[2].partition("<!--")[0]
    found = {}
    for task, what, table in re.findall(
        r"\*\*([\w-]+)\*\*, what .*?(sampled|learnt) .*?\n\n(.*?)(?:\n\n|$)", block, re.S
    ):
        head, _, *rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.strip().splitlines()]
        for row in rows:
            cells = dict(zip(head, row, strict=True))
            found[task, what, row[0], cells.get("equal", "")] = cells
    return found


TABLES = tables()


def of(column: str, *key: str, seeds: int = 3) -> str:
    """A cell, without its interval and "of 64"; percents as they are written in a text."""
    row = TABLES[key]
    assert row["seeds"] == str(seeds), key
    return row[column].split(" of ")[0].partition(" (")[0].replace("%", " %")


def drawn(column: str, arm: str) -> str:
    return of(column, "one-step", "sampled", arm, "")


def surprise(arm: str) -> str:
    return drawn("with a surprise", arm)


def covered(arm: str) -> str:
    return drawn("problems covered", arm)


def solved(arm: str, task: str = "one-step", level: str = "passes") -> str:
    return of("solved", task, "learnt", arm, level)


def after(round: int, arm: str) -> str:
    return solved(f"{arm}, round {round}", "skilled", "")


def rule(column: str, arm: str) -> str:
    return of(column, "rule", "learnt", arm, "tokens")


def follow(arm: str) -> str:
    return rule("follow the rule", arm)


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
    sounder = VERDICTS["H5"]
    before = of("solved", "one-step", "learnt", "nothing", "", seeds=1)
    assert all(value is not None for value in (sounder.difference, sounder.low, sounder.high))
    for each in (
        f"after one round {after(1, 'mix-kl')} solved, with the student's own prefixes {after(1, 'own-kl')} (H8",
        f"after three {after(3, 'mix-kl')} and {after(3, 'own-kl')} (H9",
        f"comes as far: {after(3, 'mix-sft')} (H10",
        f"{covered('mix')} of 64, rejection sampling {covered('rs')} (H1",
        f"+{100 * sounder.difference:.1f} points at equal tokens, −{-100 * sounder.low:.1f} to "
        f"+{100 * sounder.high:.1f} (H5",
        f"{solved('rs')}, with the mixture {solved('mix')} (H2",
        f"{drawn('sound', 'rs')} of its samples are sound, {drawn('sound', 'mix')} of the mixture's",
        f"{solved('reference')}, the mixture {solved('mix')} (H7",
        f"at equal tokens {solved('reference', level='tokens')} and {solved('mix', level='tokens')} |",
        f"{covered('star')} of 64 at {drawn('passes', 'star')} passes",
        f"{drawn('sound', 'star')} of the samples are sound, {surprise('star')} have a surprise, "
        f"and they taught {solved('star')}",
        f"{follow('teacher')} of the answers follow the rule afterwards, {follow('mix')} with the mixture's (H11",
        f"keeps {rule('retained', 'mix')} of what it solved, the other {rule('retained', 'teacher')} (H12",
        f"{solved('reference', 'two-step')} of the held-out problems after worked solutions, "
        f"{solved('star', 'two-step')} after rationalisation, {solved('mix', 'two-step')} after the mixture (H3",
        f"{drawn('accepted', 'shuffled')} accepted samples of {covered('shuffled')} problems taught as much, "
        f"{solved('shuffled')} (H6",
        f"a right sample of {covered('escalation')} of 64 problems at the passes at which the mixture finds "
        f"one of {covered('mix')} (H4",
        f"{drawn('sound', 'escalation')} sound and {surprise('escalation')} with a surprise, where the mixture has "
        f"{drawn('sound', 'mix')} and {surprise('mix')}",
        f"the teacher's harm: {solved('teacher')} solved after them, {before} before",
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
    of_mix = f"{covered('mix')} of 64 problems"
    for each in (
        f"{after(1, 'mix-kl')} solved after one, {after(1, 'own-kl')} from the student's own prefixes",
        f"{of_mix}, rejection sampling of {covered('rs')}",
        f"{solved('reference')}, the mixture {solved('mix')}",
        f"{follow('teacher')} follow it, {follow('mix')} of the mixture's",
    ):
        assert each in readme, each
    more = VERDICTS["H1"]
    assert more.difference is not None and more.low is not None and more.high is not None
    for each in (
        f"{of_mix} and rejection sampling of {covered('rs')} (+{100 * more.difference:.1f} points, "
        f"{100 * more.low:.1f} to {100 * more.high:.1f})",
        f"{solved('mix')} and {solved('rs')} of the held-out problems",
        f"of {covered('escalation')} of 64 problems where `kl_symmetry` alone found one of {covered('mix')}",
        f"{surprise('escalation')} instead of {surprise('mix')}",
    ):
        assert each in guide, each
