"""A comparison of runs as a table for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sglang_optimal.distill.wording import minus

Figures = dict[str, Any]


def show(result: dict[str, Any], console: Console) -> None:
    """Print what `sglang_optimal.distill.compare.compare` found: a part for each level, a column for each run and each
    pair."""
    problems = result["problems"]
    of = ", ".join(f"{count:,} of {name}" for name, count in problems["of"].items())
    console.print(escape(f"{problems['common']:,} problems in common; there are {of}"))
    for run in result["runs"]:
        if not run["complete"]:
            console.print(escape(f"{run['name']} is not complete: what it has so far"), style="yellow")
    levels = result["levels"]
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    table.add_column("", overflow="fold")
    for name in levels["all"]["runs"]:
        table.add_column(escape(name), justify="right", overflow="fold")
    for pair in levels["all"]["differences"]:
        table.add_column(escape(f"{pair['of']} − {pair['minus']}"), justify="right", style="cyan", overflow="fold")
    for level in levels.values():
        budget = "" if level["budget"] is None else f" ({level['budget']:,})"
        table.add_row(f"[bold]{level['means']}{budget}[/]")
        for label, figure, difference in _ROWS:
            cells = [figure(figures) for figures in level["runs"].values()]
            table.add_row(f"  {label}", *cells, *(difference(pair) for pair in level["differences"]))
    console.print(table)
    for run in result["runs"]:
        for row in run.get("steps", ()):
            console.print(escape(f"{run['name']}, {step_line(row)}"), style="cyan")
    console.print(
        "In brackets 95 % intervals: of shares Wilson's, of differences a bootstrap's over problems; p: McNemar's "
        "exact test. Log-probabilities and KL are of accepted samples, nats a token; surprising are those with a token "
        f"below {result['surprise_below']:g} under the student. A pass is one model's forward for one token.",
        style="dim",
    )


def step_line(row: Figures) -> str:
    """A row of `sglang_optimal.distill.escalation.step_rows` in words."""
    return (
        f"step {row['step']} ({row['alpha']}): {row['problems']:,} problems, {row['accepted']:,} of {row['samples']:,} "
        f"samples accepted, {row['covered_by_then']:,} problems covered by then, {row['passes']:,} passes"
    )


def _number(name: str) -> Callable[[Figures], str]:
    return lambda figures: f"{figures[name]:,}"


def _share(name: str) -> Callable[[Figures], str]:
    """A count, and the share that it is."""

    def cell(figures: Figures) -> str:
        share = figures[f"{name}_share"]
        if figures[name] is None or share is None:
            return "–"
        return f"{figures[name]:,}: {share['value']:.1%} ({100 * share['low']:.1f}–{100 * share['high']:.1f})"

    return cell


def _plain(name: str, times: float = 1.0, digits: int = 1, unit: str = "") -> Callable[[Figures], str]:
    def cell(figures: Figures) -> str:
        value = figures[name]
        return "–" if value is None else minus(times * value, f".{digits}f") + unit

    return cell


def _changed(name: str, times: float = 1.0, digits: int = 1) -> Callable[[Figures], str]:
    def cell(pair: Figures) -> str:
        value = pair[name]
        if value is None:
            return "–"
        numbers = [minus(times * value[key], f"+.{digits}f") for key in ("value", "low", "high")]
        return f"{numbers[0]} ({numbers[1]} to {numbers[2]})"

    return cell


def k_of_n(figures: Figures) -> str:
    """Such as ``2×0 · 1×3``: problems, and how many samples of each were accepted."""
    by_count: Counter[int] = Counter()
    for entry in figures["accepted_of_samples"]:
        by_count[entry["accepted"]] += entry["problems"]
    return " · ".join(f"{count}×{k}" for k, count in sorted(by_count.items()))


def _mcnemar(pair: Figures) -> str:
    only, other = pair["covered_by_one_alone"]
    return f"{only} : {other}, p = {pair['mcnemar_p']:.2g}"


def _nothing(pair: Figures) -> str:
    return ""


_YIELD = "accepted_per_1000_passes"
_ROWS: tuple[tuple[str, Callable[[Figures], str], Callable[[Figures], str]], ...] = (
    ("samples", _number("samples"), _nothing),
    ("tokens", _number("tokens"), _nothing),
    ("passes", _number("passes"), _nothing),
    ("accepted", _share("accepted"), _nothing),
    ("problems covered", _share("covered"), _changed("covered_share", 100)),
    ("  by one alone", _nothing, _mcnemar),
    ("problems × accepted", k_of_n, _nothing),
    ("accepted of a problem's, %", _plain("mean_rate", 100), _changed("mean_rate", 100)),
    (
        "accepted / 1000 passes",
        _plain("accepted_per_1000_passes", digits=2),
        _changed("accepted_per_1000_passes", 1, 2),
    ),
    ("student logprob", _plain("student_logprob", digits=3), _changed("student_logprob", 1, 3)),
    ("KL to the student", _plain("kl_to_student", digits=3), _changed("kl_to_student", 1, 3)),
    ("surprising", _share("surprising"), _changed("surprising_share", 100)),
)
