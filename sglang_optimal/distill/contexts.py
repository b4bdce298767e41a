"""What teacher and student read for a problem: templates, prefix strategies, and the guard that keeps the answer from
the student."""

from __future__ import annotations

import dataclasses
import difflib
import random
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import meta

from sglang_optimal.distill.leaks import leaked, mentioned
from sglang_optimal.distill.problems import Problem
from sglang_optimal.distill.records import Context
from sglang_optimal.distill.shown import Environment, MissingValue, or_missing

if TYPE_CHECKING:
    from sglang_optimal.distill.config import Contexts, Strategy, Template

# {name} that is no part of {{ name }} or {% name %}; after a LaTeX command (\boxed{answer}) the braces belong to it.
_SHORT = re.compile(r"(?P<command>\\[A-Za-z]+)?(?<![{%#])\{(?P<name>[A-Za-z_]\w*)\}(?!\})")


_JINJA_S_OWN = {"self", "super", "loop", "caller", "true", "false", "none", "True", "False", "None"}


@dataclasses.dataclass(frozen=True)
class Task:
    """One sample that is to be drawn. step: of an escalation, from 1 on."""

    id: str
    problem: Problem
    strategy: str
    sample_index: int
    step: int | None = None


class ContextBuilder:
    """Renders both sides of every task.

    Args:
        contexts: the section of the run's file.
        fields: names that templates may use.
        privileged: fields that the student must not see.
        seed: decides the strategies that are drawn.

    Raises:
        ValueError: a template is not valid Jinja, uses an unknown field, or lets the student see a privileged one.
    """

    def __init__(self, contexts: Contexts, fields: Sequence[str], privileged: Sequence[str], seed: int = 0):
        self._contexts = contexts
        self._fields = list(fields)
        self._privileged = [name for name in privileged if name in self._fields]
        self._seed = seed
        self._environment = Environment()
        self._sides: dict[str, tuple[_Side, _Side]] = {}
        default = self._side("student", contexts.student, "contexts.student")
        for i, strategy in enumerate(contexts.strategies):
            where = f"contexts.strategies[{i}]"
            teacher = self._side("teacher", strategy.teacher, f"{where}.teacher")
            student = default
            if strategy.student is not None:
                student = self._side("student", strategy.student, f"{where}.student")
            self._sides[strategy.name] = (teacher, student)
        if contexts.guard:
            for _, student in self._sides.values():
                self._check_blind(student)

    def tasks(self, problem: Problem, n: int, step: int | None = None) -> Iterator[Task]:
        """The samples of one problem, at a step of an escalation; the same whenever it is asked."""
        behind = "" if step is None else f"/{step}"
        strategies = self._contexts.strategies
        for k in range(n):
            chosen = strategies if self._contexts.select == "cross" else [self._drawn(f"{problem.id}/{k}{behind}")]
            for strategy in chosen:
                yield Task(f"{problem.id}/{strategy.name}/{k}{behind}", problem, strategy.name, k, step)

    def per_problem(self, n: int) -> int:
        """How many tasks a problem has."""
        return n * (len(self._contexts.strategies) if self._contexts.select == "cross" else 1)

    def check(self, problem: Problem) -> None:
        """Render a problem with every strategy; raises as `render`."""
        for strategy in self._sides:
            self.render(Task("", problem, strategy, 0))

    def render(self, task: Task) -> tuple[Context, Context]:
        """(teacher's context, student's context).

        Raises:
            ValueError: a template fails on this problem, renders nothing, or shows the student a privileged text.
        """
        teacher, student = (side.render(task.problem.fields, task.problem.id) for side in self._sides[task.strategy])
        if self._contexts.guard:
            self.check_read(task.problem, _plain_text(student))
        return teacher, student

    def check_read(self, problem: Problem, text: str) -> None:
        """Refuse a text that gives the student a privileged value.

        Args:
            text: what the student reads: of its messages, or decoded from its token ids.

        Raises:
            ValueError: names the problem and the field.
        """
        if not self._contexts.guard:
            return
        for name in self._privileged:
            found = leaked(problem.fields.get(name), text)
            if found is not None:
                raise ValueError(
                    f"problem {problem.id}: what the student reads gives away {name!r} ({_short(found)!r}). Clean the "
                    "data, or set contexts.guard: false."
                )

    def mentions(self, problem: Problem) -> list[str]:
        """Privileged fields of which a short value, such as a number, is a word of what the student reads: by chance,
        or not."""
        students = (self.render(Task("", problem, name, 0))[1] for name in self._sides)
        texts = [_plain_text(student) for student in students]
        values = {name: problem.fields.get(name) for name in self._privileged}
        return [name for name, value in values.items() if any(mentioned(value, text) for text in texts)]

    def _drawn(self, sample: str) -> Strategy:
        strategies = self._contexts.strategies
        generator = random.Random(f"{self._seed}/{sample}")
        return generator.choices(strategies, [strategy.weight for strategy in strategies])[0]

    def _side(self, side: str, template: Template, where: str) -> _Side:
        plain = self._contexts.format_of(side) == "text"
        if isinstance(template, str):
            parts = [("" if plain else "user", template)]
        elif isinstance(template, list):
            parts = [(message.role, message.content) for message in template]
        else:
            turns = [("system", template.system), ("user", template.user), ("assistant", template.assistant)]
            parts = [(role, content) for role, content in turns if content is not None]
        compiled = [(role, self._compiled(content, where)) for role, content in parts]
        used = set().union(*(self._used(content) for _, content in parts))
        for name in _JINJA_S_OWN & set(self._fields):
            if any(re.search(rf"\{{[^{{}}]*\b{name}\b", content) for _, content in parts):
                raise ValueError(f"{where}: the name {name!r} is Jinja's own; give the column another in data.fields.")
        near_misses = {name for _, content in parts for name in self._near_misses(content)}
        for name in sorted(used | near_misses):
            if name not in self._fields:
                near = difflib.get_close_matches(name, self._fields, n=1)
                hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(self._fields)}."
                raise ValueError(f"{where}: the data has no field {name!r}. {hint}")
        return _Side(where, compiled, used, plain=plain)

    def _compiled(self, text: str, where: str) -> jinja2.Template:
        try:
            return self._environment.from_string(self._long(text))
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"{where}: is no valid template: {error.message} (line {error.lineno}).") from None

    def _used(self, text: str) -> set[str]:
        return meta.find_undeclared_variables(self._environment.parse(self._long(text)))

    def _near_misses(self, text: str) -> set[str]:
        """Names in single braces that are nearly a field's: a typo must not go to the models as it stands."""
        names = {match["name"] for match in _SHORT.finditer(text)}
        return {name for name in names if difflib.get_close_matches(name, self._fields, n=1, cutoff=0.75)}

    def _long(self, text: str) -> str:
        """``{field}`` as Jinja has it."""

        def replace(match: re.Match) -> str:
            if match["name"] not in self._fields:
                return match[0]
            value = "{{ " + match["name"] + " }}"
            # Jinja would take LaTeX's brace for a part of its own.
            return f"{match['command']}{{{{ '{{' }}}}{value}{{{{ '}}' }}}}" if match["command"] else value

        return _SHORT.sub(replace, text)

    def _check_blind(self, student: _Side) -> None:
        seen = sorted(student.used & set(self._privileged))
        if seen:
            raise ValueError(
                f"{student.where}: shows the student {seen[0]!r}, which is privileged (data.privileged). Take it out "
                "of the template, or set contexts.guard: false if the student is meant to see it."
            )


def _plain_text(context: Context) -> str:
    return context if isinstance(context, str) else "\n".join(message["content"] for message in context)


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}…"


@dataclasses.dataclass(frozen=True)
class _Side:
    """where: path in the file. parts: (role, template). used: fields that the templates use."""

    where: str
    parts: list[tuple[str, jinja2.Template]]
    used: set[str]
    plain: bool

    def render(self, fields: dict[str, Any], problem_id: str) -> Context:
        values = {name: or_missing(value) for name, value in fields.items()}
        try:
            texts = [(role, template.render(values)) for role, template in self.parts]
        except MissingValue as error:
            raise MissingValue(f"{self.where}: problem {problem_id}: {error}") from None
        except Exception as error:  # whatever an expression in a template may raise
            raise ValueError(f"{self.where}: fails on problem {problem_id}: {error}") from None
        if not any(text.strip() for _, text in texts):
            raise ValueError(f"{self.where}: is empty for problem {problem_id}.")
        return texts[0][1] if self.plain else [{"role": role, "content": text} for role, text in texts]
