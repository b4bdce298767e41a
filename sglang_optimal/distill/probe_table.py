"""A probe for people: its table on a terminal, and its picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sglang_optimal.distill.comparison_table import k_of_n
from sglang_optimal.distill.probe_advice import LEAST_DISCORDANT, MIXTURE
from sglang_optimal.distill.store import replace_file
from sglang_optimal.distill.surprise import RARE
from sglang_optimal.distill.wording import minus

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Figures = dict[str, Any]


def show(probe: Figures, console: Console) -> None:
    """Print what `sglang_optimal.distill.probe.assessed` found."""
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    heads = (
        "setting", "problems covered", "problems × accepted", "accepted", "sound", "surprising", "student logprob",
        "KL to student", "passes / accepted",
    )  # fmt: skip
    for head in heads:
        table.add_column(head, justify="left" if head == "setting" else "right", overflow="fold")
    chosen = probe["recommendation"]["name"]
    for arm in probe["arms"]:
        style = "bold" if arm["name"] == chosen else None
        table.add_row(*(escape(cell) for cell in _cells(arm)), style=style)
    console.print(table)
    console.print(escape(_limits(probe)), style="dim")
    console.print(escape(_meanings(probe)), style="dim")
    advice = probe["recommendation"]
    console.print(f"[bold]{escape(advice['title'])}.[/] {escape(advice['reason'])}")


def _limits(probe: Figures) -> str:
    shares, pairs = [arm["covered_share"] for arm in probe["arms"]], probe["comparison"]["levels"]["all"]["differences"]
    half = max((share["high"] - share["low"]) / 2 for share in shares)
    return (
        f"{probe['problems']:,} problems, {probe['samples']} samples of each: a share of problems is known to "
        f"±{half:.0%}, and to be told apart one setting must cover at least {LEAST_DISCORDANT} problems that another "
        f"does not. In brackets 95 % intervals; {len(shares)} settings make {len(pairs)} pairs, of whose intervals one "
        "of twenty misses by chance."
    )


def _meanings(probe: Figures) -> str:
    if probe["sound_by"] == "filter":
        sound = "Sound: passed the filter equations."
    else:
        sound = "Sound: accepted texts whose equations are all true, of those that have any (there is no such filter)."
    return (
        f"{sound} Surprising: accepted samples with a token below {RARE:g} under the student. Log-probability and "
        "KL: of accepted samples, nats a token. Passes: of the models that a setting needs, one for a token of the "
        "student or teacher alone, two for one of a mixture."
    )


def _cells(arm: Figures) -> list[str]:
    share = arm["covered_share"]
    covered = f"{arm['covered']}: {share['value']:.0%} ({100 * share['low']:.0f}–{100 * share['high']:.0f})"
    sound = "–" if arm["sound"] is None else f"{arm['sound']}"
    if arm["sound"] is not None:
        sound += f" of {arm['accepted'] if arm['with_equations'] is None else arm['with_equations']}"
    return [
        arm["name"], covered, k_of_n(arm), f"{arm['accepted']} of {arm['samples']}", sound,
        "–" if arm["surprising"] is None else f"{arm['surprising']}",
        _number(arm["student_logprob"]), _number(arm["kl_to_student"]),
        "–" if arm["passes_per_accepted"] is None else f"{arm['passes_per_accepted']:,.0f}",
    ]  # fmt: skip


def _number(value: float | None) -> str:
    return "–" if value is None else minus(value, ".3f")


_COLOURS = {"student": "#2563eb", MIXTURE: "#7c3aed", "teacher": "#d97706"}


def draw(probe: Figures, path: Path) -> list[str]:
    """Write a picture of problems covered against the student's log-probability of the accepted samples, one point a
    setting, with 95 % intervals, as SVG.

    Returns:
        The settings without an accepted sample, or without log-probabilities, which have no point.
    """
    import io

    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "svg.hashsalt": "probe", "svg.fonttype": "none", "text.parse_math": False, "axes.spines.top": False,
        "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e5e7eb",
        "axes.titlelocation": "left", "axes.titleweight": "bold", "legend.frameon": False,
        "figure.constrained_layout.use": True,
    }  # fmt: skip
    left_out, seen, points = [], set(), []
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8, 5))
        axes = figure.subplots()
        for arm in probe["arms"]:
            x, ends, share = arm["student_logprob"], arm["student_logprob_interval"], arm["covered_share"]
            if x is None or ends is None:
                left_out.append(arm["name"])
                continue
            kind = arm["kind"]
            axes.errorbar(
                x, 100 * share["value"], xerr=[[max(0.0, x - ends[0])], [max(0.0, ends[1] - x)]],
                yerr=[[100 * (share["value"] - share["low"])], [100 * (share["high"] - share["value"])]],
                fmt="o", color=_COLOURS[kind], capsize=3, linewidth=1, label=None if kind in seen else kind,
            )  # fmt: skip
            seen.add(kind)
            points.append((x, 100 * share["value"], arm["name"]))
        _name_points(axes, points, probe["recommendation"]["name"])
        axes.set_xlabel("student logprob of accepted samples, nats a token (right: nearer to what it would write)")
        axes.set_ylabel("problems covered, %")
        axes.set_ylim(-3, 103)
        axes.set_title(f"{probe['problems']:,} problems, {probe['samples']} samples of each; 95 % intervals")
        if seen:
            axes.legend(loc="best")
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    replace_file(path, out.getvalue())
    return left_out


def _name_points(axes: Axes, points: list[tuple[float, float, str]], chosen: str | None) -> None:
    """Towards the middle, and above each other where points are near."""
    low, high = min((x for x, *_ in points), default=0.0), max((x for x, *_ in points), default=0.0)
    for i, (x, y, name) in enumerate(points):
        near = sum(abs(x - other) < 0.15 * (high - low or 1.0) and abs(y - there) < 3 for other, there, _ in points[:i])
        right = x > (low + high) / 2
        axes.annotate(
            name, (x, y), xytext=(-6 if right else 6, 6 + 11 * near), textcoords="offset points", fontsize=9,
            ha="right" if right else "left", fontweight="bold" if name == chosen else "normal",
        )  # fmt: skip
