"""``python -m bench.proof.page``: writes the tables of docs/proof.md anew, of the result lines that are there.

Nothing in them is written by hand, so that the page cannot say more than was measured.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from bench.proof.analysis import Verdict, bits, judge, untrained
from bench.proof.hypotheses import HYPOTHESES, MARGIN, WRITTEN
from bench.proof.lines import FOLDER, Line, read, seeds_of
from bench.proof.plan import NOTHING, PARTS, cells, data_arms, estimate
from bench.proof.scales import SCALES
from bench.proof.tasks import TASKS
from sglang_optimal.distill.intervals import wilson
from sglang_optimal.distill.wording import minus

PAGE = Path(__file__).parents[2] / "docs" / "proof.md"
NOT_RUN = "not run yet"
MEASURED = ("cpu", "gpu")


def rendered(text: str, results: dict[str, Sequence[Line]]) -> str:
    """The page with each block between ``<!-- proof:NAME -->`` and ``<!-- /proof:NAME -->`` made of the lines.

    Args:
        text: of the page as it is.
        results: lines by scale.

    Raises:
        ValueError: a block is not there, or its end is not.
    """
    blocks: dict[str, Callable[[], str]] = {"plan": _plan}
    for scale in MEASURED:
        lines = results[scale]
        blocks[f"hypotheses-{scale}"] = lambda lines=lines: _hypotheses(lines)  # type: ignore[misc]
        blocks[f"results-{scale}"] = lambda lines=lines: _results(lines)  # type: ignore[misc]
    for name, make in blocks.items():
        before, start, rest = text.partition(f"<!-- proof:{name} -->\n")
        _, end, after = rest.partition(f"<!-- /proof:{name} -->")
        if not (start and end):
            raise ValueError(f"docs/proof.md: has no block {name!r}.")
        text = f"{before}{start}{make()}{end}{after}"
    return text


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], words: int = 1) -> str:
    """words: columns of text, at the left."""
    marks = ["---" if i < words else "---:" for i in range(len(head))]
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in [head, marks, *rows])


def _plan() -> str:
    scale = SCALES["cpu"]
    before: set = set()
    rows, total = [], 0.0
    for i, part in enumerate(PARTS):
        new = [cell for cell in cells(scale, PARTS[: i + 1]) if cell not in before]
        before |= set(new)
        minutes = sum(estimate(cell, scale) for cell in new) / 60
        total += minutes
        arms = ", ".join(arm if level != "tokens" else f"{arm} (tokens)" for arm, level in part.arms)
        rows.append([part.task, arms, part.why, f"{minutes:.0f}", f"{total:.0f}"])
    return _table(["task", "arms", "for", "minutes", "so far"], rows, 3)


def _hypotheses(lines: Sequence[Line]) -> str:
    rows = []
    for each in HYPOTHESES:
        sides = f"{TASKS[each.a.task].name}: {each.a} against {each.b}"
        if each.wanted == "no less":
            sides += f", no less than {MARGIN:.0%} below"
        rows.append([each.name, each.says, f"{each.metric}; {sides}", *_verdict(judge(each, lines))])
    head = ["", "expected", "decided by", "verdict", "difference", "one alone", "p"]
    return f"Written down on {WRITTEN}.\n\n{_table(head, rows, 4)}"


def _verdict(found: Verdict) -> list[str]:
    if found.difference is None or found.low is None or found.high is None or found.p is None:
        return [NOT_RUN, "", "", ""]
    state = found.state if found.state != "not decided" else f"not decided ({found.seeds} seeds)"
    difference = f"{_points(found.difference)} ({_points(found.low)} to {_points(found.high)})"
    return [state, difference, f"{found.only_a} : {found.only_b}", f"{found.p:.3f}"]


def _points(value: float) -> str:
    return minus(100 * value, "+.1f")


def _results(lines: Sequence[Line]) -> str:
    if not lines:
        return f"{NOT_RUN.capitalize()}.\n"
    return "\n".join([_where(lines), *(part for task in TASKS for part in _task(task, lines))])


def _where(lines: Sequence[Line]) -> str:
    def of(name: str) -> str:
        return " and ".join(sorted({str(line[name]) for line in lines if line[name] is not None}))

    machine = of("gpu") or f"{of('cores')} cores of {of('cpu')}"
    versions = sorted({f"{name} {version}" for line in lines for name, version in line["versions"].items()})
    days = sorted({line["time"][:10] for line in lines})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    minutes = sum(line["seconds"] for line in lines) / 60
    return f"{of('model')}, {machine}, {when}, {minutes:.0f} minutes; {', '.join(versions)}.\n"


def _task(name: str, lines: Sequence[Line]) -> list[str]:
    own = [line for line in lines if line["task"] == name]
    parts = []
    if data := [line for line in own if line["kind"] in ("sample", "data")]:
        parts.append(f"**{name}**, what was sampled ({TASKS[name].means}); means over seeds:\n")
        parts.append(_table(_DATA_HEAD, _data_rows(name, data)))
    if trained := [line for line in own if line["kind"] in ("untrained", "teacher", "train", "rounds")]:
        parts.append(f"**{name}**, what the student learnt ({TASKS[name].means}):\n")
        parts.append(_table(_TRAINED_HEAD, _trained_rows(name, trained, lines), 2))
    return parts


_DATA_HEAD = ["", "seeds", "samples", "passes", "problems covered", "accepted", "sound", "with a surprise"]
_TRAINED_HEAD = [
    "trained on", "equal", "seeds", "passes", "samples", "tokens", "solved", "of each seed", "follow the rule",
    "retained",
]  # fmt: skip


def _groups(lines: Sequence[Line], names: Sequence[str]) -> list[tuple[tuple, list[Line]]]:
    """Lines that differ in their seed alone, in the order in which they came."""
    found: dict[tuple, list[Line]] = {}
    for line in lines:
        found.setdefault(tuple(line[name] for name in names), []).append(line)
    return list(found.items())


def _data_rows(task: str, lines: Sequence[Line]) -> list[list[object]]:
    rows = []
    order = {arm: i for i, arm in enumerate(data_arms(task))}
    groups = _groups(lines, ("kind", "arm"))
    for (kind, arm), group in sorted(groups, key=lambda item: (item[0][0] == "data", order.get(item[0][1], -1))):
        verified = TASKS[task].verified
        sound = [line["sound"] / line["accepted"] for line in group if line["accepted"] and line["sound"] is not None]
        known = sum(line["surprises_of"] for line in group)
        rows.append([
            f"all of {arm}" if kind == "sample" else arm, len(seeds_of(group)), _mean(group, "samples"),
            _mean(group, "passes"), f"{_mean(group, 'covered')} of {_mean(group, 'problems')}" if verified else "",
            _mean(group, "accepted"), f"{statistics.mean(sound):.0%}" if sound else "",
            f"{sum(line['surprises'] for line in group) / known:.0%}" if known else "",
        ])  # fmt: skip
    return rows


def _trained_rows(task: str, lines: Sequence[Line], everything: Sequence[Line]) -> list[list[object]]:
    rows = []
    before = untrained(everything, task)
    kept = bits(before["solved_problems"]) == 1 if before and before["solved"] else None
    for (kind, arm, level, round), group in _groups(lines, ("kind", "arm", "level", "round")):
        solved, of = sum(line["solved"] for line in group), sum(line["held_out"] for line in group)
        low, high = wilson(solved, of)
        each = ", ".join(str(line["solved"]) for line in sorted(group, key=lambda line: line["seed"]))
        follows = [bits(line["followed_problems"]).mean() for line in group]
        retained = [bits(line["solved_problems"])[kept].mean() for line in group] if kept is not None else []
        title = {"teacher": "the teacher itself", "untrained": NOTHING}.get(kind, arm)
        rows.append([
            f"{title}, round {round}" if kind == "rounds" else title, level if kind == "train" else "",
            len(seeds_of(group)), _mean(group, "passes"), _mean(group, "trained_samples"),
            _mean(group, "trained_tokens"), f"{solved / of:.1%} ({low:.1%}–{high:.1%})", each,
            f"{statistics.mean(follows):.0%}",
            f"{statistics.mean(retained):.0%}" if retained else "",
        ])  # fmt: skip
    return rows


def _mean(lines: Sequence[Line], name: str) -> str:
    values = [line[name] for line in lines if line.get(name) is not None]
    return f"{statistics.mean(values):,.0f}" if values else ""


def page(text: str | None = None) -> str:
    """The page as it should be, of the lines that are checked in."""
    text = PAGE.read_text(encoding="utf-8") if text is None else text
    return rendered(text, {scale: read(FOLDER / f"{scale}.jsonl") for scale in MEASURED})


def main(argv: list[str] | None = None) -> int:
    argparse.ArgumentParser(prog="bench.proof.page", description=__doc__.splitlines()[0]).parse_args(argv)
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
