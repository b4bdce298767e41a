"""Each filter alone, and the chain."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_optimal.distill.config import parse_config
from sglang_optimal.distill.filters import FilterChain
from sglang_optimal.distill.filters.answer import last_boxed
from sglang_optimal.distill.filters.text import repeated_share
from sglang_optimal.distill.numbers import numbers
from sglang_optimal.distill.records import Record

CONTEXTS = {"student": "{problem}", "strategies": [{"teacher": "{problem}"}]}


def record(text="The answer is 7.", answer="7", **values) -> Record:
    values = {"token_ids": list(range(10)), "finish_reason": "stop", **values}
    return Record(
        id=values.pop("id", "p/default/0"), problem_id=values.pop("problem_id", "p"), strategy="default",
        sample_index=0, fields={"problem": "3 + 4?", "answer": answer}, teacher_context="t", student_context="s",
        text=text, **values,
    )  # fmt: skip


def chain(*filters: dict) -> FilterChain:
    return FilterChain(parse_config({"contexts": CONTEXTS, "filters": list(filters)}).filters)


def verdict(settings: dict, made: Record) -> str | None:
    rejection = chain(settings)(made)
    return None if rejection is None else rejection.reason


@pytest.mark.parametrize(
    ("settings", "tokens", "reason"),
    [
        ({"min_tokens": 10}, 10, None),
        ({"min_tokens": 11}, 10, "too short"),
        ({"max_tokens": 10}, 10, None),
        ({"max_tokens": 9}, 10, "too long"),
        ({}, 0, None),
    ],
)
def test_length(settings, tokens, reason):
    assert verdict({"type": "length", **settings}, record(token_ids=[1] * tokens)) == reason


def test_finish():
    assert verdict({"type": "finish"}, record()) is None
    assert verdict({"type": "finish"}, record(finish_reason="length")) == "ended by length"
    assert verdict({"type": "finish", "reasons": ["length", "stop"]}, record(finish_reason="length")) is None


@pytest.mark.parametrize(
    ("settings", "text", "answer", "reason"),
    [
        ({"match": "exact"}, " 7\n", "7", None),
        ({"match": "exact"}, "The answer is 7.", "7", "wrong answer"),
        ({"match": "exact", "ignore_case": True}, "Paris", "PARIS", None),
        ({"match": "exact"}, "Paris", "PARIS", "wrong answer"),
        ({"match": "contains"}, "It is Paris, of course.", "Paris", None),
        ({"match": "contains"}, "It is paris.", "Paris", "wrong answer"),
        ({"match": "contains", "ignore_case": True}, "It is paris.", "Paris", None),
        ({"match": "numeric"}, "First 3, then 4. The answer is 7.", "3 + 4 = 7", None),
        ({"match": "numeric"}, "The answer is 7.0001.", "7", "wrong answer"),
        ({"match": "numeric", "tolerance": 1e-3}, "The answer is 7.0001.", "7", None),
        ({"match": "numeric"}, "It costs $1,250.50.", "1250.5", None),
        ({"match": "numeric"}, "seven", "7", "no answer found"),
        ({"match": "numeric"}, "7", "seven", "the expected answer has no number"),
        ({"match": "numeric"}, "0", 0, None),
        ({"match": "numeric", "expected_pattern": r"####\s*(.+)"}, "7", "3+4=7\n#### 7\n", None),
        ({"match": "numeric", "expected_pattern": r"####\s*(.+)"}, "7", "no mark 7", "no answer found"),
        ({"match": "exact", "extract": "last_line"}, "Well:\n\n7\n \n", "7", None),
        ({"match": "exact", "extract": "boxed"}, "\\boxed{3} or \\boxed{\\frac{1}{2}}", "\\frac{1}{2}", None),
        ({"match": "exact", "extract": "boxed"}, "no box 7", "7", "no answer found"),
        ({"extract": "pattern", "pattern": r"answer is (\d+)"}, "answer is 3, answer is 7", "7", None),
        ({"match": "exact", "extract": "pattern", "pattern": r"\d+"}, "3 7", "7", None),
        ({"match": "math", "extract": "boxed"}, "so \\boxed{0.5}", "\\frac12", None),
        ({"match": "math"}, "so it is $\\boxed{\\frac{2}{4}}$", "0.5", None),
        ({"match": "math"}, "so it is $\\boxed{\\frac{2}{5}}$", "0.5", "wrong answer"),
        ({"match": "math"}, "The solutions are $\\{2, 1\\}$", "$\\{1,2\\}$", None),
        ({"match": "math"}, "I do not know.", "\\sqrt{2}", "wrong answer"),
        ({"match": "exact"}, "7", None, "the problem has no answer"),
        ({"match": "exact", "field": "final"}, "7", "7", "the problem has no final"),
    ],
)
def test_answer(settings, text, answer, reason):
    assert verdict({"type": "answer", **settings}, record(text, answer)) == reason


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("12 - 5 = 7", [12, 5, 7]), ("12-5", [12, 5]), ("a -3", [-3]), ("(-3.5)", [-3.5]), ("1,234,567.8", [1234567.8]),
        ("1, 2,3", [1, 2, 3]), (".5 and 1e3", [0.5, 1000]), ("x2", [2]), ("7.", [7]), ("none", []), ("3*-4", [3, -4]),
        ("10,00", [10, 0]),
    ],
)  # fmt: skip
def test_numbers(text, found):
    assert numbers(text) == found


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        ("\\boxed{1}", "1"), ("\\boxed{{1}}", "{1}"), ("\\boxed{1} \\boxed{2", "1"), ("\\boxed{", None),
        ("\\boxed{}", ""), ("no", None),
    ],
)  # fmt: skip
def test_last_boxed(text, boxed):
    assert last_boxed(text) == boxed


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(1, 5))
def test_repeated_share_counts_what_occurred_before(tokens, n):
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    repeats = sum(gram in grams[:i] for i, gram in enumerate(grams))
    assert repeated_share(tokens, n) == pytest.approx(repeats / len(grams) if grams else 0.0)


def test_repetition():
    assert verdict({"type": "repetition"}, record(token_ids=[1, 2, 3, 4] * 10)) == "repeated 4-grams"
    assert verdict({"type": "repetition"}, record(token_ids=list(range(40)))) is None
    lines = {"type": "repetition", "max_line_repeats": 2}
    assert verdict(lines, record("a\nb\na\n\n\n\nc")) is None
    assert verdict(lines, record("a\nb\n a \na")) == "repeated line"


def test_language():
    english = "This is a sentence about the weather in the mountains, and it is quite long."
    german = "Dies ist ein Satz über das Wetter in den Bergen, und er ist ziemlich lang."
    assert verdict({"type": "language", "allowed": ["en"]}, record(english)) is None
    assert verdict({"type": "language", "allowed": ["en"]}, record(german)) == "language de"
    assert verdict({"type": "language", "allowed": ["en", "de"]}, record(german)) is None
    assert verdict({"type": "language", "allowed": ["en"]}, record("Ja ja")) is None  # too short to tell
    with pytest.raises(ValueError, match="filters: language: allowed: unknown language 'english'"):
        chain({"type": "language", "allowed": ["english"]})


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"min_mean": 0.5}, None),
        ({"min_mean": 0.51}, "mean alpha too small"),
        ({"max_mean": 0.49}, "mean alpha too great"),
        ({"max_share_above": [0.8, 0.25]}, None),
        ({"max_share_above": [0.8, 0.2]}, "alpha too often above 0.8"),
    ],
)
def test_alpha(settings, reason):
    assert verdict({"type": "alpha", **settings}, record(alpha=[0.2, 0.4, 0.5, 0.9])) == reason


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"max_mean_to_student": 1.0}, None),
        ({"max_mean_to_student": 0.9}, "far from the student"),
        ({"max_mean_to_teacher": 0.1}, "far from the teacher"),
        ({"max_token_to_student": 1.9}, "a token far from the student"),
        ({"max_token_to_student": 2.0}, None),
    ],
)
def test_kl(settings, reason):
    made = record(kl_to_student=[0.0, 2.0], kl_to_teacher=[0.2, 0.4])
    assert verdict({"type": "kl", **settings}, made) == reason


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"min_mean_logprob": -1.5}, None),
        ({"min_mean_logprob": -1.4}, "unlikely under the student"),
        ({"floor": 0.06, "min_share": 0.5}, None),
        ({"floor": 0.06, "min_share": 0.6}, "tokens the student would not write"),
        ({"floor": 0.04}, None),
    ],
)
def test_coverage(settings, reason):
    made = record(student_logprob=[0.0, math.log(0.05)])
    assert verdict({"type": "coverage", **settings}, made) == reason


def test_a_sample_without_tokens_does_not_pass_by_nan():
    assert verdict({"type": "coverage", "min_mean_logprob": -9}, record(student_logprob=[])) is not None
    assert verdict({"type": "alpha", "max_mean": 0.9}, record(alpha=[])) is not None


def test_deduplicate():
    same = chain({"type": "deduplicate"})
    assert same(record("Seven is it")) is None
    assert same(record(" seven  IS it")).reason == "duplicate"
    assert same(record("seven is it", problem_id="q")) is None
    whole = chain({"type": "deduplicate", "scope": "run", "normalize": False})
    assert whole(record("Seven")) is None
    assert whole(record("seven", problem_id="q")) is None
    assert whole(record("Seven", problem_id="q")).reason == "duplicate"
    resumed = chain({"type": "deduplicate"})
    resumed.remember([("p", "Seven")])
    assert resumed(record("seven")).reason == "duplicate"


def keep(made: Record, least: int = 0):
    """Used by name, below."""
    if least < 0:
        raise RuntimeError("no")
    return {0: True, 1: False, 2: "too dull", 3: None, 4: 5}[least]


@pytest.mark.parametrize(
    ("least", "reason"),
    [
        (0, None), (1, "refused"), (2, "too dull"), (3, None), (-1, "error: RuntimeError: no"),
        (4, "error: TypeError: test_filters:keep must return True, False, None or a reason; got 5"),
    ],
)  # fmt: skip
def test_function(least, reason, monkeypatch):
    monkeypatch.syspath_prepend(str(__import__("pathlib").Path(__file__).parent))
    settings = {"type": "function", "function": "test_filters:keep", "arguments": {"least": least}}
    assert verdict(settings, record()) == reason


@pytest.mark.parametrize("name", ["nowhere:keep", "test_filters:nothing", "json:decoder"])
def test_function_that_is_not_there(name, monkeypatch):
    monkeypatch.syspath_prepend(str(__import__("pathlib").Path(__file__).parent))
    with pytest.raises(ValueError, match=f"filters: mine: function: .*{name}"):
        chain({"type": "function", "name": "mine", "function": name})


def test_the_first_that_refuses():
    filters = chain({"type": "finish"}, {"type": "length", "name": "short", "max_tokens": 3}, {"type": "length"})
    rejection = filters(record(finish_reason="length"))
    assert (rejection.filter, rejection.reason) == ("finish", "ended by length")
    assert filters(record()).filter == "short"
    assert json.dumps(filters(record(token_ids=[1]))) == "null"


@pytest.mark.parametrize(
    ("text", "finish_reason", "reason"),
    [
        ("It is 4 \ufffd", "length", "cut inside a character"),
        ("It is 4 \ufffd", "stop", "bytes that are no character"),
        ("It \ufffd is 4", "length", "bytes that are no character"),
    ],
)
def test_text_that_is_not_what_was_sampled(text, finish_reason, reason):
    rejection = chain()(record(text=text, finish_reason=finish_reason))
    assert (rejection.filter, rejection.reason) == ("characters", reason)
