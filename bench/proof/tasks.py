"""The tasks: word problems of one and of two steps, and a rule that the teacher is told and no verifier checks."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from sglang_optimal.demo.loop.evaluate import solves
from sglang_optimal.demo.loop.problems import NAMES, THINGS, WordProblem, word_problems
from sglang_optimal.distill.equations import equations

QUESTION = "Answer this question: {problem}"
HELD_OUT_SEED = 1_000_003
"""Of the held-out problems, the same for every seed, so that arms and seeds can be paired."""
KINDS = 4
"""Problems i and i + KINDS are of one kind: their solutions differ in names and numbers alone."""


class Maker(Protocol):
    def __call__(self, count: int, seed: int, *, apart_from: frozenset[str] = ...) -> list[WordProblem]: ...


def _two_steps(problem: str, first: str, second: str, result: int, unit: str) -> WordProblem:
    solution = f"First {first}. Then {second} = {result} {unit}. The answer is {result}."
    return WordProblem(problem, solution, str(result))


def buys_and_gives(rng: random.Random, name: str, things: str) -> WordProblem:
    a, b = rng.randint(5, 40), rng.randint(3, 30)
    c = rng.randint(2, a + b - 1)
    text = f"{name} has {a} {things}, buys {b} more and gives {c} away. How many {things} does {name} have now?"
    return _two_steps(text, f"{a} + {b} = {a + b}", f"{a + b} - {c}", a + b - c, things)


def boxes_and_loose(rng: random.Random, name: str, things: str) -> WordProblem:
    a, b, c = rng.randint(2, 9), rng.randint(2, 12), rng.randint(2, 20)
    text = f"{name} has {a} boxes with {b} {things} in each, and {c} loose {things}. How many {things} is that?"
    return _two_steps(text, f"{a} * {b} = {a * b}", f"{a * b} + {c}", a * b + c, things)


def pays_and_keeps(rng: random.Random, name: str, things: str) -> WordProblem:
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    c = a * b + rng.randint(2, 30)
    text = f"{name} has {c} dollars and buys {b} {things} at {a} dollars each. How many dollars are left?"
    return _two_steps(text, f"{b} * {a} = {a * b}", f"{c} - {a * b}", c - a * b, "dollars")


def two_days(rng: random.Random, name: str, things: str) -> WordProblem:
    a, b, c = rng.randint(3, 30), rng.randint(3, 30), rng.randint(3, 30)
    text = f"{name} finds {a} {things} on Monday, {b} on Tuesday and {c} on Friday. How many {things} is that?"
    return _two_steps(text, f"{a} + {b} = {a + b}", f"{a + b} + {c}", a + b + c, things)


TWO_STEPS: tuple[Callable[[random.Random, str, str], WordProblem], ...] = (
    buys_and_gives, boxes_and_loose, pays_and_keeps, two_days,
)  # fmt: skip


def two_step_problems(count: int, seed: int, *, apart_from: frozenset[str] = frozenset()) -> list[WordProblem]:
    """As `word_problems`, of two steps."""
    rng = random.Random(seed)
    problems: list[WordProblem] = []
    seen = set(apart_from)
    while len(problems) < count:
        made = TWO_STEPS[len(problems) % KINDS](rng, rng.choice(NAMES), rng.choice(THINGS))
        if made.problem not in seen:
            seen.add(made.problem)
            problems.append(made)
    return problems


RULE = """\
Write the calculation as one equation, and end with the words "The answer is" and the number.

Examples:
Question: Lea has 6 pens and gets 3 more. How many pens does Lea have?
Answer: Lea has 6 + 3 = 9 pens. The answer is 9.
Question: Jon has 12 eggs and eats 4 of them. How many eggs are left?
Answer: Jon has 12 - 4 = 8 eggs. The answer is 8.
Question: Kim has 3 bags with 5 nuts in each. How many nuts does Kim have?
Answer: Kim has 3 * 5 = 15 nuts. The answer is 15."""
"""The same for every problem; it has no problem's answer in it."""


def follows_rule(text: str) -> bool:
    """Whether there is an equation, true or not, and the text ends with the sentence."""
    end = text.strip().rpartition("The answer is ")[2]
    return "The answer is " in text and end.rstrip(".").isdigit() and bool(equations(text))


@dataclasses.dataclass(frozen=True)
class Task:
    """name, means: in tables. make: problems. teacher: template; the student's is `QUESTION`. verified: an answer
    filter judges samples.
    sources: of `bench.proof.sources` that are sampled."""

    name: str
    means: str
    make: Maker
    teacher: str | dict[str, str]
    verified: bool
    max_new_tokens: int
    sources: tuple[str, ...]

    def training(self, count: int, seed: int) -> list[WordProblem]:
        """Problems to sample on; none of the held-out ones."""
        held_out = frozenset(p.problem for p in self.held_out(_MOST_HELD_OUT))
        return self.make(count, seed, apart_from=held_out)

    def held_out(self, count: int) -> list[WordProblem]:
        return self.make(count, HELD_OUT_SEED)

    def contexts(self, *, shuffled: bool = False) -> dict[str, Any]:
        """The run's section ``contexts``."""
        teacher = self.teacher
        if shuffled:
            assert isinstance(teacher, str)
            teacher = teacher.replace("{solution}", "{wrong_solution}")
        return {"format": "chat", "student": QUESTION, "strategies": [{"name": "proof", "teacher": teacher}]}

    def filters(self) -> list[dict[str, Any]]:
        judged = [{"type": "answer", "match": "numeric", "field": "answer"}] if self.verified else []
        return [
            {"type": "finish", "reasons": ["stop"]}, {"type": "length", "min_tokens": 4}, *judged,
            {"type": "deduplicate", "scope": "problem"},
        ]  # fmt: skip


_MOST_HELD_OUT = 1000
_COPY = QUESTION + "\n\nCopy this answer: {solution}"
TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(
            "one-step", "one step, the teacher reads the worked solution", word_problems, _COPY, True, 64,
            ("student", "mixture", "teacher", "budget-0.1", "budget-0.5", "shuffled"),
        ),
        Task(
            "two-step", "two steps, the teacher reads the worked solution", two_step_problems, _COPY, True, 80,
            ("student", "mixture", "teacher", "budget-0.1", "budget-0.5"),
        ),
        Task(
            "rule", "one step, the teacher reads a rule, no verifier", word_problems,
            {"system": RULE, "user": QUESTION}, False, 64, ("mixture", "teacher"),
        ),
        Task(
            "skilled", "one step, the teacher was trained on worked solutions and reads what the student reads",
            word_problems, QUESTION, True, 64, (),
        ),
    )
}  # fmt: skip


def rows_of(problems: list[WordProblem]) -> list[dict[str, str]]:
    """Rows of a run's data; ``wrong_solution`` is that of the next problem with another answer, of the
    same kind where there is one.

    Raises:
        ValueError: a problem has none.
    """
    rows = []
    for i, problem in enumerate(problems):
        alike = [problems[(i + KINDS * k) % len(problems)] for k in range(1, len(problems))]
        others = [*alike, *problems[i + 1 :], *problems[:i]]  # of another kind, where there are next to none
        wrong = next((other for other in others if other.answer != problem.answer), None)
        if wrong is None:
            raise ValueError(f"problems: {len(problems)} are too few for a wrong solution of each; give more.")
        rows.append({"id": f"{i:04d}", **dataclasses.asdict(problem), "wrong_solution": wrong.solution})
    return rows


def judged(texts: list[str], problems: list[WordProblem]) -> str:
    """``1`` for each that the text solves, ``0`` for others, in their order."""
    return "".join("01"[solves(text, problem)] for text, problem in zip(texts, problems, strict=True))


def followed(texts: list[str]) -> str:
    """The same for the rule."""
    return "".join("01"[follows_rule(text)] for text in texts)
