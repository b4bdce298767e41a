"""``distill preview``: what both sides of a run will read, and whether its references pass its filters; without a
server, and before anything is sampled."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sglang_optimal.distill.differences import SAME, STUDENT, Part, differences
from sglang_optimal.distill.pipeline import Plan
from sglang_optimal.distill.readers import Reading, SideReader
from sglang_optimal.distill.records import Context, context_text
from sglang_optimal.distill.references import ITSELF, Judgement, judge_references

if TYPE_CHECKING:
    from rich.console import Console

    from sglang_optimal.distill.contexts import Task
    from sglang_optimal.distill.problems import Problem

AROUND = 30
"""Characters of what both sides read that are shown on either side of a difference."""


@dataclasses.dataclass
class Read:
    """What one side reads for a problem, shown once however many samples read it.

    Attributes:
        samples: ids of the samples. format: ``chat`` or ``text``. context: as the template gives it.
        reading: as the model reads it.
    """

    format: str
    context: Context
    reading: Reading
    samples: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Shown:
    """One problem.

    Attributes:
        problem: its id. student, teacher: the different contexts of each side.
        differences: {(index in ``student``, index in ``teacher``): parts} of those that are sampled together.
    """

    problem: str
    student: list[Read]
    teacher: list[Read]
    differences: dict[tuple[int, int], list[Part]]


@dataclasses.dataclass(frozen=True)
class Preview:
    """Attributes:
    problems: the first of the run's. references: see `judge_references`. judged: problems that were looked at for it.
    remarks: see `Plan.remarks`. total_problems, total_samples: of the run; of an escalation
            with its steps the most that may come.
    """

    problems: list[Shown]
    references: list[Judgement]
    judged: int
    remarks: list[str]
    total_problems: int
    total_samples: int
    steps: int = 1


def preview(
    plan: Plan, *, problems: int, judged: int, tokenizer: str | None = None, student_tokenizer: str | None = None
) -> Preview:
    """Render the first problems of a run, and judge the references.

    Args:
        plan: of the run.
        problems: how many to render. judged: how many to judge.
        tokenizer, student_tokenizer: folder or id, of both sides and of the student; by default as `SideReader`.

    Raises:
        ValueError: a number is negative, or a tokenizer cannot be loaded.
    """
    for flag, number in (("--problems", problems), ("--judge", judged)):
        if number < 0:
            raise ValueError(f"{flag}: must not be negative, got {number}.")
    readers = {
        "teacher": SideReader(plan.config, "teacher", tokenizer),
        "student": SideReader(plan.config, "student", student_tokenizer or tokenizer),
    }
    shown = [_shown(plan, problem, readers) for problem in plan.problems[:problems]]
    several = plan.problems[:judged]
    references = judge_references(plan.config.filters, several, plan.config.data.privileged) if several else []
    return Preview(shown, references, len(several), plan.remarks(), len(plan.problems), plan.total, len(plan.steps))


def _shown(plan: Plan, problem: Problem, readers: dict[str, SideReader]) -> Shown:
    shown = Shown(problem.id, [], [], {})
    for task in plan.builder.tasks(problem, plan.config.sampling.n, None if plan.config.escalate is None else 1):
        teacher, student = plan.builder.render(task)
        contexts = plan.config.contexts
        i = _add(shown.student, contexts.format_of("student"), student, task, readers["student"])
        j = _add(shown.teacher, contexts.format_of("teacher"), teacher, task, readers["teacher"])
        if (i, j) not in shown.differences:
            shown.differences[i, j] = differences(shown.student[i].reading.text, shown.teacher[j].reading.text)
    return shown


def _add(reads: list[Read], format: str, context: Context, task: Task, reader: SideReader) -> int:
    """The place of ``context`` among those of its side."""
    known = [context_text(read.context) for read in reads]
    text = context_text(context)
    if text not in known:
        reads.append(Read(format, context, reader.read(context)))
        known.append(text)
    place = known.index(text)
    reads[place].samples.append(task.id)
    return place


def as_json(done: Preview) -> dict[str, Any]:
    """Plain values; the differences as a list, each with both indices and (who reads it, text) parts."""

    def problem(shown: Shown) -> dict[str, Any]:
        parts = [
            {"student": i, "teacher": j, "parts": [{"read_by": kind, "text": text} for kind, text in parts]}
            for (i, j), parts in shown.differences.items()
        ]
        sides = {side: [dataclasses.asdict(read) for read in getattr(shown, side)] for side in ("student", "teacher")}
        return {"problem": shown.problem, **sides, "differences": parts}

    values = {field.name: getattr(done, field.name) for field in dataclasses.fields(done)}
    return {
        **values,
        "problems": [problem(shown) for shown in done.problems],
        "references": [dataclasses.asdict(judgement) for judgement in done.references],
    }


def show(done: Preview, console: Console) -> None:
    """Print it."""
    for shown in done.problems:
        _show_problem(shown, console)
    for judgement in done.references:
        _show_judgement(judgement, done, console)
    if not done.references and done.judged:
        _say(console, "no filter of the type answer: the references are not judged.", style="dim")
    for remark in done.remarks:
        _say(console, remark, style="yellow")
    _say(console, f"{done.total_problems} problems, {_at_most(done)}{done.total_samples} samples; the file is valid.")


def _say(console: Console, text: str, style: str | None = None, end: str = "\n") -> None:
    console.print(text, style=style, end=end, markup=False, highlight=False, soft_wrap=True)


def _show_problem(shown: Shown, console: Console) -> None:
    for side in ("student", "teacher"):
        for read in getattr(shown, side):
            reading = read.reading
            tokens = "" if reading.tokens is None else f", {reading.tokens} tokens"
            _say(
                console, f"{_samples(read.samples)} · {side} × {len(read.samples)} · {read.format}{tokens}", "bold cyan"
            )
            if reading.note is not None:
                _say(console, f"  messages, without the chat template: {reading.note}.", style="yellow")
            for line in reading.text.split("\n"):
                _say(console, f"  {line}")
    for (i, j), parts in shown.differences.items():
        pair = f"student {i + 1} and teacher {j + 1}" if len(shown.differences) > 1 else "student and teacher"
        if all(kind == SAME for kind, _ in parts):
            _say(console, f"{shown.problem} · {pair} read the same: the teacher knows no more.", style="yellow")
            continue
        _say(console, f"{shown.problem} · {pair} differ: [-student's-] {{+teacher's+}}", style="bold")
        _say(console, "  ", end="")
        for k, (kind, text) in enumerate(parts):
            if kind == SAME:
                _say(console, _shortened(text, first=k == 0, last=k == len(parts) - 1), style="dim", end="")
            elif kind == STUDENT:
                _say(console, f"[-{_indented(text)}-]", style="red", end="")
            else:
                _say(console, f"{{+{_indented(text)}+}}", style="green", end="")
        _say(console, "")


def _at_most(done: Preview) -> str:
    return f"{done.steps} steps, at most " if done.steps > 1 else ""


def _samples(ids: Sequence[str]) -> str:
    """Such as ``p0/copy/0,2, p0/hint/1``."""
    numbers: dict[str, list[str]] = {}
    for name in ids:
        strategy, _, number = name.rpartition("/")
        numbers.setdefault(strategy, []).append(number)
    return ", ".join(
        f"{strategy}/{','.join(some) if len(some) < 9 else f'{some[0]}…{some[-1]}'}"
        for strategy, some in numbers.items()
    )


def _shortened(text: str, *, first: bool, last: bool) -> str:
    """The ends of a text that lie at a difference."""
    if len(text) <= 2 * AROUND:
        return _indented(text)
    before, after = ("" if first else text[:AROUND]), ("" if last else text[-AROUND:])
    return _indented(f"{before} … {after}")


def _indented(text: str) -> str:
    return text.replace("\n", "\n  ")


def _show_judgement(judgement: Judgement, done: Preview, console: Console) -> None:
    of = f" (the first {done.judged} problems)" if done.judged < done.total_problems else ""
    good = judgement.passed == judgement.judged and not judgement.without and judgement.judged
    what = "the text itself" if judgement.form == ITSELF else "its final answer, as a sample would say it,"
    _say(
        console,
        f"filter {judgement.filter}, field {judgement.field!r}: {what} passes in {judgement.passed} of "
        f"{judgement.judged}{of}.",
        style="green" if good else "yellow",
    )
    if judgement.without and judgement.form == ITSELF:
        _say(
            console,
            f"  {judgement.without} problems have no expected answer: every sample of theirs will be rejected.",
            style="yellow",
        )
    for failure in judgement.failures:
        text = " ".join(failure.text.split())
        end = text if len(text) <= 80 else f"…{text[-80:]}"
        _say(console, f"  {failure.problem}: {failure.reason}: {end}")
