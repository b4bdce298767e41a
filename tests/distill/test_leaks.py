"""The answer guard: what gives an answer away, and what does not; values as the file has them in the templates."""

from __future__ import annotations

import pytest

from sglang_optimal.distill.config import parse_config
from sglang_optimal.distill.contexts import ContextBuilder
from sglang_optimal.distill.pipeline import Plan
from sglang_optimal.distill.problems import Problem
from sglang_optimal.distill.records import Record
from sglang_optimal.distill.shown import MissingValue

GSM8K = "Natalia sold 48/2 = 24 clips in May.\nShe sold 48+24 = 72 altogether.\n#### 72"


def builder(answer, *, format="chat", teacher="{problem} {answer}", **fields) -> tuple[ContextBuilder, Problem]:
    contexts = {"format": format, "student": "{problem}", "strategies": [{"teacher": teacher}]}
    problem = Problem("p1", {"problem": "?", "answer": answer, **fields})
    return ContextBuilder(parse_config({"contexts": contexts}).contexts, list(problem.fields), ["answer"]), problem


def student_reads(answer, problem: str, format: str) -> None:
    made, task = builder(answer, format=format, problem=problem)
    made.check(task)


@pytest.mark.parametrize("format", ["chat", "text"])
@pytest.mark.parametrize(
    "answer,problem",
    [
        (GSM8K, f"How many? {GSM8K}"),
        (GSM8K, "How many? The total. #### 72"),
        (GSM8K, "How many? (Answer: 72)"),
        (GSM8K, "As we know, she sold 48+24 = 72 altogether."),
        ('He said "I never lie", twice.', 'Quote: He said "I never lie", twice. Now go on.'),
        ('He said "I never lie", twice.', "Quote: He said &quot;I never lie&quot;, twice."),
        (r"\frac{1}{2} \cdot \sqrt{3} = x", r"Show that \frac{1}{2} \cdot \sqrt{3} = x"),
        ("a text of some length", "A  TEXT of\nsome length, with white space"),
        ("１２３４５６７８９０１２３４５６", "the number 1234567890123456"),
        (72, "The answer is 72."),
        (72, "**Answer:** 72"),
        ("72", r"so \boxed{72}"),
        ("B", "Answer: (B)"),
        ("B", "the answer is **B**"),
        (3.5, "Solution = 3.5"),
        ("七", "答案：七"),
        (["one long text of answers", 7], "with one long text of answers in it"),
        ({"final": 7, "work": "x"}, "the result is 7"),
    ],
)
def test_a_leak(answer, problem, format):
    with pytest.raises(ValueError, match="problem p1: what the student reads gives away 'answer'"):
        student_reads(answer, problem, format)


@pytest.mark.parametrize(
    "answer,problem",
    [
        (GSM8K, "Natalia sold 72 clips to 48 friends. How many?"),
        ("5", "Ava has 5 apples and 3 pears. If x = 5, what is the answer?"),
        ("5", "What is the answer to 5 + 0?"),
        ("72", "72 is the answer"),
        ("72", "The answer is seventy-two, or 72.0"),
        ("1234", "The answer is 1,234"),
        ("72", "The answer is 725. Or 72.5?"),
        ("B", "A: one. B: two. Which?"),
        ("yes", "Answer yes or no."),
        ("", "anything"),
        (None, "the answer is None"),
    ],
)
def test_no_leak(answer, problem):
    made, task = builder(answer, teacher="{problem}", problem=problem)
    made.check(task)


def test_short_values_are_counted_and_said(tmp_path):
    rows = ["problem,answer", "5 and 3?,5", "2 and 3?,5", "15?,5"]
    (tmp_path / "p.csv").write_text("\n".join(rows) + "\n")
    contexts = {"student": "{problem}", "strategies": [{"teacher": "{answer}"}]}
    plan = Plan(parse_config({"data": {"path": str(tmp_path / "p.csv")}, "contexts": contexts}))
    (remark,) = plan.remarks()
    assert remark.startswith("the student's prompt of 1 of 3 problems has a short value of 'answer' as a word")


@pytest.mark.parametrize(
    ("answer", "problem", "counted"),
    [("72", "x = 72", True), ("72", "72 is the answer", True), ("72", "72.0", True), ("72", "seventy-two", False)]
    + [("1234", "1,234", False), ("B", "A or B?", True), ("abcdefghijklmno", "abcdefghijklmno?", True)],
)
def test_which_short_values_are_counted(answer, problem, counted):
    made, task = builder(answer, problem=problem)
    assert made.mentions(task) == (["answer"] if counted else [])


def test_what_was_decoded_is_looked_at_as_well():
    made, task = builder("72", problem="?")
    made.check_read(task, "<|im_start|>user\n?<|im_end|>")
    with pytest.raises(ValueError, match="gives away 'answer'"):
        made.check_read(task, "<|im_start|>system\nThe answer is 72.<|im_end|>")


@pytest.mark.parametrize(
    "value,text",
    [(True, "true"), (["a", 1], '["a", 1]'), ({"k": "é"}, '{"k": "é"}'), ("007", "007"), ("None", "None"), (0, "0")],
)  # fmt: skip
def test_templates_show_values_as_the_file_has_them(value, text):
    made, task = builder(value)
    teacher, _ = made.render(next(made.tasks(task, 1)))
    assert teacher[0]["content"] == f"? {text}"


def test_a_missing_value_is_no_text(tmp_path):
    made, task = builder(None)
    with pytest.raises(MissingValue, match="contexts.strategies.0..teacher: problem p1: a value .* is missing"):
        made.check(task)
    made, task = builder(None, teacher="{% if answer %}{{ answer }}{% else %}none{% endif %}")
    made.check(task)
    (tmp_path / "p.csv").write_text("problem,answer\na,1\nb,\nc,3\n")
    contexts = {"student": "{problem}", "strategies": [{"teacher": "{answer}"}]}
    run = {"data": {"path": str(tmp_path / "p.csv")}, "contexts": contexts}
    with pytest.raises(ValueError, match="is missing .* Mend the data, or set data.missing: skip"):
        Plan(parse_config(run))
    run["data"]["missing"] = "skip"
    plan = Plan(parse_config(run))
    assert [problem.fields["problem"] for problem in plan.problems] == ["a", "c"]
    assert plan.remarks()[0].startswith("1 problems left out (data.missing: skip)")


@pytest.mark.parametrize(
    "teacher",
    [
        "{{ problem ~ answer }}", "{{ answer | upper }}", "{{ answer | string }}", "{{ answer | trim }}",
        "{{ [problem, answer] | join }}", "{{ 'x%s' | format(answer) }}", "{{ 'x{}'.format(answer) }}",
        "{{ answer | replace('e', 'a') }}", "{{ more.note }}", "{{ more['note'] ~ '!' }}", "{{ answer | tojson }}",
    ],
)  # fmt: skip
def test_a_missing_value_is_no_word_in_any_expression(teacher):
    made, task = builder(None, teacher=teacher, more={"note": None})
    with pytest.raises(ValueError, match="problem p1: .*(is missing|not JSON serializable)"):
        made.check(task)


@pytest.mark.parametrize(
    ("teacher", "text"),
    [
        ("{{ answer or '-' }}", "-"), ("{{ answer | default('-', true) }}", "-"),
        ("{{ '-' if answer is none else answer }}", "-"), ("{{ '-' if answer == none else answer }}", "-"),
        ("{{ '-' if more.note is none else 'x' }}", "-"), ("{{ 'x' if answer is not none else '-' }}", "-"),
    ],
)  # fmt: skip
def test_templates_may_ask_whether_a_value_is_missing(teacher, text):
    made, task = builder(None, teacher=teacher, more={"note": None})
    assert made.render(next(made.tasks(task, 1)))[0][0]["content"] == text


def test_names_of_jinja_s_own():
    made, task = builder("x", teacher="{range} {dict}", range="far", dict="words")
    assert made.render(next(made.tasks(task, 1)))[0][0]["content"] == "far words"
    with pytest.raises(ValueError, match="the name 'self' is Jinja's own; give the column another in data.fields"):
        builder("x", teacher="{self}", self="me")


def test_numbers_stay_as_written(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"problem": "?", "answer": 0.10, "more": {"list": [1e3, 2, "x"]}}\n')
    contexts = {"student": "{problem}", "strategies": [{"teacher": "{answer} {{ more }} {{ more.list }}"}]}
    plan = Plan(parse_config({"data": {"path": str(tmp_path / "p.jsonl")}, "contexts": contexts}))
    teacher, _ = plan.builder.render(next(plan.tasks()))
    assert teacher[0]["content"] == '0.10 {"list": [1e3, 2, "x"]} [1e3, 2, "x"]'
    row = Record("p/s/0", "p", "s", 0, plan.problems[0].fields, teacher, "?", "", [], "stop").row()
    assert (
        row["answer"] == "0.10" and row["fields"] == '{"answer": 0.10, "more": {"list": [1e3, 2, "x"]}, "problem": "?"}'
    )
