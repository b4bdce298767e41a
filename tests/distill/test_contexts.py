"""Templates, prefix strategies, and the guard."""

from __future__ import annotations

from collections import Counter

import pytest

from sglang_optimal.distill.config import parse_config
from sglang_optimal.distill.contexts import ContextBuilder
from sglang_optimal.distill.problems import Problem

PROBLEM = Problem("p1", {"problem": "What is 3 + 4?", "answer": "7", "topic": "sums"})


def builder(student="{problem}", teacher="{problem} {answer}", *, privileged=("answer",), seed=0, **contexts):
    contexts = {"student": student, "strategies": [{"teacher": teacher}], **contexts}
    config = parse_config({"contexts": contexts}).contexts
    return ContextBuilder(config, list(PROBLEM.fields), privileged, seed)


def rendered(made: ContextBuilder, problem: Problem = PROBLEM):
    (task,) = made.tasks(problem, 1)
    return made.render(task)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{problem}", "What is 3 + 4?"),
        ("{{ problem }}", "What is 3 + 4?"),
        ("{{problem}} ({topic})", "What is 3 + 4? (sums)"),
        ("{% if topic == 'sums' %}Add. {% endif %}{problem}", "Add. What is 3 + 4?"),
        ("{problem | upper}", "{problem | upper}"),
        ("{{ problem | upper }}", "WHAT IS 3 + 4?"),
        ("\\boxed{topic} \\frac{1}{2}", "\\boxed{sums} \\frac{1}{2}"),
        ("within \\boxed{}. {problem}", "within \\boxed{}. What is 3 + 4?"),
        ("{ problem } {1} {unrelated}", "{ problem } {1} {unrelated}"),
        ("<b>{problem}</b> & more\n", "<b>What is 3 + 4?</b> & more\n"),
    ],
)
def test_template(template, text):
    assert rendered(builder(template))[1] == [{"role": "user", "content": text}]


def test_a_value_is_not_a_template():
    problem = Problem("x", {"problem": "{answer} {{ answer }} {% raw %}", "answer": "a secret answer", "topic": ""})
    assert rendered(builder(), problem)[1][0]["content"] == "{answer} {{ answer }} {% raw %}"


def test_forms():
    turns = {"system": "Be {topic}.", "user": "{problem}", "assistant": "So"}
    messages = [{"role": "user", "content": "{problem}"}, {"role": "assistant", "content": "{answer}"}]
    teacher, student = rendered(builder(turns, messages))
    assert [m["role"] for m in student] == ["system", "user", "assistant"]
    assert student[0]["content"] == "Be sums." and student[2]["content"] == "So"
    assert teacher == [{"role": "user", "content": "What is 3 + 4?"}, {"role": "assistant", "content": "7"}]


def test_plain_text():
    teacher, student = rendered(builder(format="text"))
    assert (teacher, student) == ("What is 3 + 4? 7", "What is 3 + 4?")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ probelm }}", "contexts.student: the data has no field 'probelm'. Did you mean 'problem'?"),
        ("{probelm}", "contexts.student: the data has no field 'probelm'. Did you mean 'problem'?"),
        ("{{ problem", "contexts.student: is no valid template"),
        ("{% if %}", "contexts.student: is no valid template"),
        ("{{ problem.missing.more }}", "contexts.student: fails on problem p1"),
        ("{{ problem / 3 }}", "contexts.student: fails on problem p1"),
        ("{{ ''.__class__.__mro__ }}", "contexts.student: fails on problem p1"),  # sandboxed
        ("{{ '' }}", "contexts.student: is empty for problem p1"),
    ],
)
def test_wrong_template(template, message):
    with pytest.raises(ValueError) as caught:
        rendered(builder(template))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "student",
    [
        "{problem} {answer}",
        "{{ answer }}",
        "{% if answer %}{problem}{% endif %}",
        {"system": "{answer}", "user": "{problem}"},
        [{"role": "user", "content": "{{ problem ~ answer }}"}],
        "\\boxed{answer}",
    ],
)
def test_the_student_may_not_see_the_answer(student):
    with pytest.raises(ValueError, match="shows the student 'answer', which is privileged"):
        builder(student)
    rendered(builder(student, guard=False))


def test_nor_in_the_student_of_a_strategy():
    strategies = [{"teacher": "{answer}"}, {"name": "open", "teacher": "{answer}", "student": "{answer}"}]
    with pytest.raises(ValueError, match=r"contexts.strategies\[1\].student: shows the student 'answer'"):
        builder(strategies=strategies)


def test_nor_the_text_of_it_in_the_data():
    answer = "The answer is seven, because 3 + 4 = 7."
    leaky = Problem("p2", {"problem": f"What is 3 + 4? {answer}", "answer": answer, "topic": ""})
    with pytest.raises(ValueError, match="problem p2: what the student reads gives away 'answer'"):
        rendered(builder(), leaky)
    rendered(builder(guard=False), leaky)
    by_chance = Problem("p3", {"problem": "Is 7 a prime?", "answer": "7", "topic": ""})
    rendered(builder(), by_chance)


STRATEGIES = [{"name": "often", "weight": 3, "teacher": "a {answer}"}, {"name": "rarely", "teacher": "b {answer}"}]


def problems(count: int) -> list[Problem]:
    return [Problem(f"p{i}", {"problem": str(i), "answer": "x", "topic": ""}) for i in range(count)]


def test_drawn_strategies():
    made = builder(strategies=STRATEGIES)
    tasks = [task for problem in problems(500) for task in made.tasks(problem, 4)]
    assert len(tasks) == 500 * made.per_problem(4) == 2000
    assert len({task.id for task in tasks}) == 2000
    counts = Counter(task.strategy for task in tasks)
    assert abs(counts["often"] / 2000 - 0.75) < 0.05
    again = [task for problem in problems(500) for task in builder(strategies=STRATEGIES).tasks(problem, 4)]
    assert [t.id for t in again] == [t.id for t in tasks]
    other = [t for p in problems(500) for t in builder(strategies=STRATEGIES, seed=1).tasks(p, 4)]
    assert [t.id for t in other] != [t.id for t in tasks]


def test_more_samples_keep_the_first():
    made = builder(strategies=STRATEGIES)
    few = {task.id for problem in problems(20) for task in made.tasks(problem, 2)}
    many = {task.id for problem in problems(20) for task in made.tasks(problem, 5)}
    assert few < many


def test_crossed_strategies():
    made = builder(strategies=STRATEGIES, select="cross")
    tasks = list(made.tasks(PROBLEM, 2))
    assert [task.id for task in tasks] == ["p1/often/0", "p1/rarely/0", "p1/often/1", "p1/rarely/1"]
    assert made.per_problem(2) == 4
    assert made.render(tasks[1])[0][0]["content"] == "b 7"
