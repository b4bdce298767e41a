"""Problems, their solutions, wrong hints and the rule."""

from __future__ import annotations

from fractions import Fraction

import pytest

from bench.proof.tasks import KINDS, RULE, TASKS, followed, follows_rule, judged, rows_of, two_step_problems
from sglang_optimal.distill.equations import equations


def test_solutions_of_two_steps_are_right():
    problems = two_step_problems(400, 3)
    assert len({problem.problem for problem in problems}) == 400 and problems == two_step_problems(400, 3)
    for problem in problems:
        found = equations(problem.solution)
        assert len(found) == 2 and all(each.true for each in found), problem
        assert Fraction(problem.answer) in found[-1].values and int(problem.answer) >= 0
        assert problem.answer not in ("",) and problem.solution.endswith(f"The answer is {problem.answer}.")
    assert judged([problem.solution for problem in problems], problems) == "1" * 400


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_held_out_problems_are_apart_and_the_same_for_every_seed(task):
    held_out = {problem.problem for problem in task.held_out(100)}
    assert len(held_out) == 100
    first, second = task.training(80, 0), task.training(80, 1)
    assert first != second and first == task.training(80, 0)
    assert not held_out & {problem.problem for problem in [*first, *second]}


def test_wrong_hints_are_of_the_same_kind_and_have_another_answer():
    problems = TASKS["one-step"].training(80, 0)
    for i, row in enumerate(rows_of(problems)):
        assert row["wrong_solution"] != row["solution"]
        place = next(j for j, other in enumerate(problems) if other.solution == row["wrong_solution"])
        assert place % KINDS == i % KINDS and problems[place].answer != row["answer"]
    assert len({row["id"] for row in rows_of(problems)}) == 80
    assert all(row["wrong_solution"] for row in rows_of(problems[:4])), "of another kind, where there is no other"
    with pytest.raises(ValueError, match="too few for a wrong solution"):
        rows_of(problems[:1])


def test_the_shuffled_teacher_reads_the_wrong_solution():
    task = TASKS["one-step"]
    assert "{wrong_solution}" in str(task.contexts(shuffled=True)) and "{solution}" not in str(
        task.contexts(shuffled=True)
    )
    assert "{solution}" in str(task.contexts()) and "wrong" not in str(task.contexts())


def test_who_reads_what():
    """Neither the skilled teacher nor the rule's reads an answer."""
    assert TASKS["skilled"].teacher == TASKS["one-step"].contexts()["student"]
    assert "{solution}" not in str(TASKS["rule"].teacher) and "{answer}" not in str(TASKS["rule"].teacher)
    assert not any(f["type"] == "answer" for f in TASKS["rule"].filters())
    for answer in RULE.split("Answer: ")[1:]:
        assert follows_rule(answer.splitlines()[0])


@pytest.mark.parametrize(
    ("text", "follows"),
    [
        ("Tom has 3 + 4 = 7 pens. The answer is 7.", True),
        ("Tom has 3 + 4 = 8 pens. The answer is 8", True),  # a false equation is one, and the answer another matter
        ("The answer is 7.", False),
        ("3 + 4 = 7", False),
        ("3 + 4 = 7. The answer is 7 pens.", False),
        ("3 + 4 = 7. The answer is 7. So there.", False),
        ("", False),
    ],
)
def test_the_rule(text, follows):
    assert follows_rule(text) is follows and followed([text, "x"]) == f"{int(follows)}0"
