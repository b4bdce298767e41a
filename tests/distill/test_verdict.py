"""The page's verdict is the `answer` filter's."""

from __future__ import annotations

import time

import pytest

from sglang_optimal.distill.filters import Answer
from sglang_optimal.distill.quantity import last_quantity
from sglang_optimal.distill.verdict import LONGEST_TEXT, Verdict, judged


@pytest.mark.parametrize(
    "text,answer,verdict,said,expected",
    [
        ("so 60 * 3 = 180 kilometers.", "60 * 3 = 180. The answer is 180.", "right", "180", "180"),
        ("he pays 1,080.00 dollars", "The answer is 1080.", "right", "1,080.00", "1080"),
        ("So, the answer is 100.", "180", "wrong", "100", "180"),
        ("it is −5", "-5", "right", "−5", "−5"),
        ("it is 5", "-5", "wrong", "5", "−5"),
        ("٤٢", "42", "right", "42", "42"),
        ("I do not know.", "180", "none", None, "180"),
        ("", "180", "none", None, "180"),
        ("at 10:30", "10:30", "right", "10:30", "10:30"),
        ("1" * 5000, "1" * 5000, "right", "1" * 5000, "1" * 5000),  # more digits than Python reads: as texts
    ],
)
def test_numbers(text, answer, verdict, said, expected):
    assert judged(text, answer) == Verdict(verdict, "numeric", said, expected)
    accepted = Answer(type="answer", match="numeric").judge(text, answer) is None
    assert accepted == (verdict == "right")


@pytest.mark.parametrize(
    "text,answer,verdict",
    [
        ("The capital is canberra, not Sydney.", "Canberra.", "right"),
        ("It is Sydney.", "Canberra.", "wrong"),
        ("", "Canberra", "wrong"),
    ],
)
def test_words(text, answer, verdict):
    found = judged(text, answer)
    assert (found.verdict, found.match, found.expected) == (verdict, "contains", "Canberra")
    assert found.said == ("Canberra" if verdict == "right" else None)
    filter_ = Answer(type="answer", match="contains", ignore_case=True)
    assert (filter_.judge(text, "Canberra") is None) == (verdict == "right")


@pytest.mark.parametrize("answer", ["", "  ", ".", "first\nsecond", "word " * 20])
def test_nothing_to_compare_with(answer):
    assert judged("It is 5.", answer) == Verdict("unjudged", None, None, None)


@pytest.mark.parametrize("answer", ["{2}", "3\\pi"])
def test_part_of_an_expression(answer):
    assert last_quantity(answer).text is None
    assert judged("It is 5.", answer).verdict == "unjudged"


@pytest.mark.parametrize(
    "unit",
    ["1", "1 ", " ", "\\frac", "\\frac 1", "-", "(", "$1", "\u00a0111", "1,111,", "\\text{", " \\frac" + " " * 50],
)
def test_no_text_keeps_a_server_busy(unit):
    for text in ((unit * LONGEST_TEXT)[: 2 * LONGEST_TEXT], "\\frac" + (unit * LONGEST_TEXT)[:LONGEST_TEXT]):
        begin = time.process_time()
        judged(text, "1")
        assert time.process_time() - begin < 2
