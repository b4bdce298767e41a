"""The demo's output: three texts of each problem side by side, the mixture's tokens coloured by alpha."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.style import Style
from rich.table import Table
from rich.text import Text

from sglang_optimal.demo.problems import Problem
from sglang_optimal.engine import GenerationResult
from sglang_optimal.token_view import decoder, token_pieces

STUDENT_COLOUR, EVEN_COLOUR, TEACHER_COLOUR = (74, 144, 255), (200, 200, 200), (255, 140, 40)


def alpha_style(alpha: float) -> Style:
    """Blue where the student decides (alpha 0), grey at 1/2, orange where the teacher does (alpha 1)."""
    alpha = min(max(alpha, 0.0), 1.0)
    low, high = (STUDENT_COLOUR, EVEN_COLOUR) if alpha < 0.5 else (EVEN_COLOUR, TEACHER_COLOUR)
    share = 2 * alpha if alpha < 0.5 else 2 * alpha - 1
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(low, high, strict=True))
    return Style(color=f"#{red:02x}{green:02x}{blue:02x}")


def coloured(tokenizer, result: GenerationResult) -> Text:
    """The generated text, each token in the colour of its alpha."""
    text = Text()
    pieces = token_pieces(decoder(tokenizer, skip_special_tokens=True), result.token_ids)
    for piece, alpha in zip(pieces, result.alphas, strict=True):
        text.append(piece, alpha_style(alpha))
    return text


def legend() -> Text:
    text = Text("alpha, the teacher's weight for each token:  ")
    for step in range(11):
        text.append(f" {step / 10:.1f} ", alpha_style(step / 10) + Style(bold=True))
    return text


@dataclasses.dataclass(frozen=True)
class Column:
    """One way to generate: its title, and a result for each problem."""

    title: str
    results: list[GenerationResult]

    def mean(self, name: str) -> float:
        """Mean of a per-token series over all tokens."""
        values = [v for r in self.results for v in (r.alphas if name == "alpha" else r.mixing_info[name])]
        return sum(values) / max(len(values), 1)


def problem_table(tokenizer, number: int, problem: Problem, columns: Sequence[Column]) -> Table:
    """One problem: the texts of all columns, the last one coloured."""
    title = f"[bold]{number}. {escape(problem.problem)}[/]\n[dim]the teacher sees: {escape(problem.answer)}[/]"
    table = Table(title=title, title_justify="left", title_style="none", expand=True, padding=(0, 1))
    cells = []
    for i, column in enumerate(columns):
        result = column.results[number - 1]
        mark = "[green]✓[/]" if problem.solved_by(result.text) else "[red]✗[/]"
        table.add_column(f"{column.title} {mark}", ratio=1, vertical="top")
        cells.append(coloured(tokenizer, result) if i == len(columns) - 1 else Text(result.text.strip()))
    table.add_row(*cells)
    mixture = columns[-1].results[number - 1]
    means = {name: sum(values) / max(len(values), 1) for name, values in mixture.mixing_info.items()}
    table.caption = (
        f"mixture: {len(mixture.token_ids)} tokens, mean alpha {mixture.alpha.mean:.3f}, "
        f"KL to student {means['kl_to_student']:.3f}, KL to teacher {means['kl_to_teacher']:.3f}, "
        f"ESS ratio {means['ess_ratio']:.3f}"
    )
    table.caption_justify = "left"
    return table


def summary_table(problems: Sequence[Problem], columns: Sequence[Column]) -> Table:
    """One line a measure, one column a way to generate."""
    table = Table(title="All problems", title_justify="left", title_style="bold")
    table.add_column("mean over tokens, in nats")
    for column in columns:
        table.add_column(column.title, justify="right")
    measures = (
        ("alpha", "alpha"),
        ("KL(q* || student)", "kl_to_student"),
        ("KL(q* || teacher)", "kl_to_teacher"),
        ("log-probability under the student", "student_logprob"),
        ("log-probability under the teacher", "teacher_logprob"),
        ("ESS ratio, student to teacher", "ess_ratio"),
    )
    for label, name in measures:
        last = name == measures[-1][1]
        table.add_row(label, *(f"{column.mean(name):.3f}" for column in columns), end_section=last)
    solved = [sum(p.solved_by(r.text) for p, r in zip(problems, c.results, strict=True)) for c in columns]
    table.add_row("problems solved", *(f"{n} of {len(problems)}" for n in solved), style="bold")
    return table


def save_svg(path: str, parts: Sequence[RenderableType]) -> None:
    """Write ``parts``, one under the other, as a picture of a terminal."""
    console = Console(record=True, file=io.StringIO(), width=140, force_terminal=True)
    for part in parts:
        console.print(part, "")
    svg = console.export_svg(title="make demo")
    # The viewer's own monospace font will do; a picture should not load anything.
    Path(path).write_text(re.sub(r"@font-face\s*{[^}]*}", "", svg))
