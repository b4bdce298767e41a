"""What a text works out, and the filter on it."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_filters import chain, record, verdict

from sglang_optimal.distill.equations import equations

TRUE = [
    "3 + 4 = 7", "17 − 5 = 12.", "2 × 3 = 6", "2 x 3 = 6", "2*3=6", "2 · 3 = 6", "7 / 2 = 3.5", "7÷2=3.5", "8 – 5 = 3",
    "1,200 + 34 = 1,234", "1,234,567 * 2 = 2,469,134", "100 000 + 1 = 100 001", "-3 + 5 = 2", "5 - 8 = −3",
    "3 * -4 = -12", "(−3) × (−4) = 12", "3 - -4 = 7", "8 -5 = 3", "$5 + $3 = $8", "3 * $2.50 = $7.50",
    "50% + 50% = 100%", "10 / 50 = 20%", "10 / 50 * 100 = 20%", "20% * 50 = 10", "20% of 50 = 10", "0.1 + 0.2 = 0.3",
    "1 + 2 + 3 = 6", "7 = 3 + 4", "(3 + 4) * 2 = 14", "2(3+4) = 14", "1 1/2 + 1/2 = 2", "2½ + ½ = 3", "2^3 + 1 = 9",
    "5² = 25", "2 apples + 3 apples = 5 apples", "5 km/h * 2 h = 10 km", "3 × 4 × 5 = 60 cm³", "48/2 = <<48/2=24>>24",
    "x = 5 + 3 = 8", "He has 7 (3 + 4 = 7) apples", "- 16 - 3 = 13", "1. 16 - 3 = 13", "**3 + 4 = 7**",
    "So: 3 + 4 = 7!",
    "\\(3 \\times 4 = 12\\)", "$3 \\times 4 = 12$", "\\frac{1}{2} + \\frac{1}{2} = \\boxed{1}", "٣ + ٤ = ٧",
    "３＋４＝７",
    "5 apples and 3 + 4 = 7 pears - so it is.", "999999999999999999999 + 1 = 1000000000000000000000", "3 + 4 == 7",
]  # fmt: skip
FALSE = [
    "3 + 4 = 8", "20% * 50 = 1000", "2 + 3 = 5 + 4", "10/3 = 3.33", "5 / 0 = 0", "3 + 4 = 17 (2 apples)", "7 = 3 + 5",
    "10^100000 = 1", "0 - 5 = 5", "1,200 + 34 = 1,235", "999999999999999999999 + 1 = 1000000000000000000001",
]  # fmt: skip
NONE = [
    "", "=", "= = =", "+ = +", "3 + = 7", "x = 5", "3 = 7", "2x + 3 = 7", "2 x + 3 = 7", "x2 + 3 = 5", "√16 + 1 = 5",
    "3! + 1 = 7", "f(3) + 4 = 7", "a+3+4 = 7", "3 + 4 ≈ 7.1", "3 + 4 >= 7", "3 + 4 != 8", "10:30 + 5 = 35",
    "3 + 4 = 7x",
    "1,5 + 3 = 4,5", "The answer is 24.", "3 + 4 = seven", "x^2 + 3 = 7", "4 +\n3 = 7", "1" * 5000 + " + 1 = 2",
    "(" * 3000 + "1" + ")" * 3000 + " + 1 = 2", "-" * 3000 + "1 + 1 = 2",
]  # fmt: skip


@pytest.mark.parametrize(("texts", "found"), [(TRUE, [True]), (FALSE, [False]), (NONE, [])])
def test_one_equation(texts, found):
    assert {text[:60]: [e.true for e in equations(text)] for text in texts} == {text[:60]: found for text in texts}


def test_several():
    assert [e.true for e in equations("2 + 3 = 5 + 4 = 9")] == [False, True]
    assert [e.text for e in equations("3 + 4 = 7. Then 7 + 5 = 12, so 12 / 4 = 3 each")] == [
        "3 + 4 = 7", "7 + 5 = 12", "12 / 4 = 3",
    ]  # fmt: skip
    assert [e.values for e in equations("2 + 2 = 4\n- 3 + 4 = 7 = 3 + 4")] == [(4,), (7,), (7,)]


@given(st.integers(-(10**30), 10**30), st.integers(-(10**6), 10**6), st.sampled_from("+-*"), st.integers(-1, 1))
def test_whole_numbers(a, b, operator, off):
    value = {"+": a + b, "-": a - b, "*": a * b}[operator] + off
    (found,) = equations(f"so {a} {operator} {b} = {value:,}.")
    assert found.true is (off == 0) and found.values == (value,)


@given(st.text("0123456789+-*/=()x .,%$\n", max_size=60))
def test_any_text_is_read(text):
    for found in equations(text):
        assert all(isinstance(value, Fraction) for value in found.values)


@pytest.mark.parametrize(
    ("text", "answer", "settings", "reason"),
    [
        ("3 + 4 = 7. The answer is 7.", "7", {}, None),
        ("The answer is 7.", "7", {}, "no equation"),
        ("The answer is 7.", "7", {"min_equations": 0, "last_is_answer": False}, None),
        ("The answer is 7.", "7", {"min_equations": 0}, "no equation"),
        ("3 + 4 = 8. The answer is 7.", "7", {}, "a false equation"),
        ("3 + 4 = 7. The answer is 8.", "8", {}, "the last equation is not the answer"),
        ("3 + 4 = 7. The answer is 8.", "8", {"last_is_answer": False}, None),
        ("3 + 4 = 7", "7", {"min_equations": 2}, "too few equations"),
        ("3 + 4 = 7, 7 + 1 = 8", "8", {"min_equations": 2}, None),
        ("3 + 4 = 7", "3 + 4 = 7\n#### 7", {"expected_pattern": r"####\s*(.+)"}, None),
        ("3 + 4 = 7", "no mark", {"expected_pattern": r"####\s*(.+)"}, "the problem has no answer"),
        ("3 + 4 = 7", None, {}, "the problem has no answer"),
        ("3 + 4 = 7", "seven", {}, "the expected answer is no number"),
        ("3 + 4 = 7", None, {"last_is_answer": False}, None),
        ("10 / 50 * 100 = 20%", "20 %", {}, None),
        ("10 / 50 = 0.2", "1/5", {}, None),
        ("10 / 3 = 3.33", "3.33", {}, "a false equation"),
        ("10 / 3 = 3.33", "3.33", {"tolerance": 0.01}, None),
        ("1,200 − 1,250 = −50", "-50", {}, None),
    ],
)
def test_the_filter(text, answer, settings, reason):
    assert verdict({"type": "equations", **settings}, record(text, answer)) == reason


@pytest.mark.parametrize("settings", [{"expected_pattern": "("}, {"tolerance": -1}, {"min_equations": -1}, {"x": 1}])
def test_wrong_settings(settings):
    with pytest.raises(ValueError, match=rf"filters\[0\](\.|: unknown key '){next(iter(settings))}"):
        chain({"type": "equations", **settings})
