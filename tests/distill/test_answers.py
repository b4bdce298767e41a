# ruff: noqa: E501  # a row a line is easier to read
"""A table of expected answers, as GSM8K, MATH, AIME and data of other countries write them, with samples that are right
and samples that are wrong. What is judged wrongly still is marked, and named in the guide."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_filters import record, verdict

GUIDE = Path(__file__).parents[2] / "docs" / "distillation_guide.md"

# (match, expected answer, right samples, wrong samples)
TABLE = [
    # GSM8K
    ("numeric", "72", ["72", "The answer is 72.", "#### 72", "So 48 + 24 = 72 clips.", "**72**", "72.0"], ["73", "7.2", "#### 27"]),
    ("numeric", "#### 1,250", ["1250", "$1,250", "\\$1,250.00", "1 250 in all", "1250 dollars"], ["1", "250", "1.25", "125"]),
    ("numeric", "-42", ["-42", "\u221242", "-$42", "$-42", "\uff0d42", "= -42."], ["42", "-41", "0-42x"]),
    ("numeric", "5", ["10 - 5 = 5", "5 apples", "5 cm", "five is 5"], ["10-5", "-5", "5.5", "15"]),
    ("numeric", "12", ["12 m^2", "12 m\u00b2", "12 cm^3", "12m2", "x2 = 12"], ["2", "3", "12.5", "1,2"]),
    # Fractions, mixed numbers, powers, times
    ("numeric", "3/4", ["3/4", "0.75", "\\frac{3}{4}", "\\frac34", "\\dfrac{3}{4}", "\\boxed{\\tfrac{3}{4}}", "\u00be", "6/8"], ["1/4", "4", "3", "4/3", "\\frac{1}{4}"]),
    ("numeric", "3 1/2", ["3.5", "7/2", "3 1/2", "3\\frac{1}{2}", "3\u00bd"], ["5 1/2", "1/2", "31/2", "3"]),
    ("numeric", "-1/2", ["-0.5", "-1/2", "-\\frac{1}{2}"], ["1/2", "-2", "2"]),
    ("numeric", "10:30", ["10:30", "at 10:30"], ["9:30", "30", "10", "10.5"]),
    ("numeric", "3:4", ["3:4"], ["4", "3/4", "1:4"]),
    ("numeric", "2024-05-08", ["2024-05-08"], ["08", "2024-05-09", "2024"]),
    ("numeric", "1000000", ["10^6", "1e6", "1,000,000", "1\u202f000\u202f000", "1 000 000", "10^{6}", "1.000.000"], ["6", "10^5", "1,000", "000"]),
    ("numeric", "1500", ["1.5\\times10^3", "1.5 \u00d7 10^{3}", "1.5e3", "1.5 \\cdot 10^3"], ["3", "10", "1.5", "150"]),
    ("numeric", "9", ["3^2"], ["2", "3"]),
    # Huge integers are exact
    ("numeric", "123456789012345678901234567890", ["123456789012345678901234567890"], ["123456789012345678901234567891", "1.2345678901234568e29"]),
    ("numeric", "1234567", ["1,234,567"], ["1234568"]),
    ("numeric", "0.333333", ["0.3333333"], ["0.334"]),
    # Separators of other countries
    ("numeric", "1234.5", ["1.234,5", "1\u202f234,5", "1'234.5", "1\u2019234.5", "1,234.5"], ["1.234", "12345", "5"]),
    ("numeric", "123456", ["1,23,456", "123 456", "1'23'456x 123456"], ["456", "23,456"]),
    ("numeric", "10,\\!080", ["10080", "10,080", "10{,}080", "10\\,080"], ["80", "10", "080"]),
    ("numeric", "3.5", ["3.5", "\u0663\u066b\u0665", "\uff13.\uff15"], ["5", "3"]),
    ("numeric", "123", ["\u0967\u0968\u0969", "\u0661\u0662\u0663", "\uff11\uff12\uff13", "\u5171123\u4e2a"], ["124", "23"]),
    ("numeric", "30000", ["3\u4e07", "3 \u4e07", "3\u842c", "30000\u5143"], ["3", "3\u4ebf"]),
    ("numeric", "150000000", ["1.5\u4ebf", "1.5\u5104"], ["1.5\u4e07", "1.5"]),
    ("numeric", "50%", ["50", "50%", "50 %", "50\\%"], ["0.5", "5"]),
    # Parts of expressions are no numbers
    ("numeric", "13", ["13"], ["3\\sqrt{13}", "\u221a13", "\\frac{\\pi}{13}", "\\{12, 13\\}"]),
    # MATH: bare LaTeX in the data
    ("math", "1 - \\sqrt{2}", ["\\boxed{1-\\sqrt{2}}", "$1-\\sqrt 2$", "1-\\sqrt{2}"], ["\\boxed{1}", "\\boxed{\\sqrt{2}}", "\\boxed{1+\\sqrt{2}}"]),
    ("math", "3\\sqrt{13}", ["3\\sqrt{13}", "\\boxed{3\\sqrt{13}}", "\\boxed{\\sqrt{117}}", "It is $3\\sqrt{13}$."], ["3", "\\boxed{3}", "\\boxed{3\\sqrt{7}}", "\\boxed{13}"]),
    ("math", "\\left( 3, \\frac{\\pi}{2} \\right)", ["(3, \\frac{\\pi}{2})", "\\boxed{(3, \\pi/2)}", "$\\left(3,\\frac{\\pi}{2}\\right)$"], ["3", "\\boxed{(3, \\pi)}", "\\boxed{(\\frac{\\pi}{2}, 3)}"]),
    ("math", "x^2 + 2", ["x^2+2", "\\boxed{x^2+2}", "$2 + x^2$"], ["2", "\\boxed{x^2}", "\\boxed{x^2-2}"]),
    ("math", "10,\\!080", ["10080", "\\boxed{10080}", "\\boxed{10,080}"], ["10", "\\boxed{80}"]),
    ("math", "\\frac{1}{2}", ["0.5", "\\boxed{\\frac12}", "1/2", "$\\dfrac{1}{2}$", "\\boxed{2/4}"], ["2", "1", "\\boxed{\\frac{1}{3}}"]),
    ("math", "\\text{Tuesday}", ["\\boxed{\\text{Tuesday}}"], ["\\boxed{\\text{Monday}}"]),
    ("math", "[0,1)", ["\\boxed{[0,1)}"], ["\\boxed{(0,1)}", "\\boxed{[0,1]}", "\\boxed{[0,2)}"]),
    ("math", "90^\\circ", ["90", "\\boxed{90^\\circ}"], ["\\boxed{9}", "\\boxed{45^\\circ}"]),
    ("math", "204", ["\\boxed{204}", "204", "$204$"], ["\\boxed{20}", "\\boxed{240}"]),
    ("math", "\\{1,2\\}", ["\\boxed{\\{1,2\\}}", "$\\{2, 1\\}$"], ["\\boxed{\\{1\\}}", "\\boxed{\\{1,3\\}}"]),
    ("math", "2\\pi", ["\\boxed{2\\pi}", "$2 \\pi$"], ["2", "\\boxed{\\pi}", "\\boxed{4\\pi}"]),
    # Letters and words
    ("exact", "B", ["B", " B\n"], ["(B)", "b", "A", ""]),
    ("exact", "yes", ["yes"], ["no", "Yes", "yes."]),
    ("contains", "Paris", ["It is Paris."], ["It is Rome.", "paris", ""]),
]  # fmt: skip

KNOWN_WRONG = {
    # (match, expected, sample): whether it is accepted, wrongly
    ("numeric", "3.5", "3,5"): False,
    ("numeric", "7", "seven"): False,
    ("numeric", "50", "\u767e\u5206\u4e4b\u4e94\u5341"): False,
    ("numeric", "2", "(1, 2)"): True,
    ("numeric", "2", "x^2 + 2"): True,
    ("numeric", "1000", "1 thousand"): False,
    ("math", "3\\sqrt{13}", "the answer is 3\\sqrt{13}."): False,
}
"""What is judged wrongly, in the guide's words under "Filtering"."""

PAIRS = [
    (match, expected, said, right)
    for match, expected, accepted, rejected in TABLE
    for said, right in [*((text, True) for text in accepted), *((text, False) for text in rejected)]
]


def test_the_table_is_long_enough():
    assert len(PAIRS) >= 200


@pytest.mark.parametrize("match", ["numeric", "math", "exact", "contains"])
def test_verdicts(match):
    wrong = []
    for kind, expected, said, right in PAIRS:
        if kind == match and (verdict({"type": "answer", "match": kind}, record(said, expected)) is None) != right:
            wrong.append((expected, said, right))
    assert not wrong


def test_what_is_still_wrong():
    """A mended one leaves the list, and the guide."""
    for (match, expected, said), accepted in KNOWN_WRONG.items():
        got = verdict({"type": "answer", "match": match}, record(said, expected)) is None
        assert got == accepted, (match, expected, said)
        assert f"`{said}`" in GUIDE.read_text(), said


@pytest.mark.parametrize("match", ["exact", "contains", "numeric", "math"])
@pytest.mark.parametrize("expected", ["", "  \n", None])
def test_an_empty_answer_accepts_nothing(match, expected):
    for said in ("", "7", "anything"):
        assert verdict({"type": "answer", "match": match}, record(said, expected)) == "the problem has no answer"


@pytest.mark.parametrize("tolerance,said,right", [(0.01, "101", True), (0.01, "102", False), (0, "100.00001", False)])
def test_a_tolerance_that_is_given_holds_for_integers_too(tolerance, said, right):
    settings = {"type": "answer", "match": "numeric", "tolerance": tolerance}
    assert (verdict(settings, record(said, "100")) is None) == right


@pytest.mark.parametrize(
    "text,boxed",
    [("\\boxed {7}", "7"), ("\\boxed 7", "7"), ("\\fbox{7}", "7"), ("\\boxed{1} \\boxed{2", "1"), ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}")],
)  # fmt: skip
def test_boxes(text, boxed):
    from sglang_optimal.distill.mentions import last_boxed

    assert last_boxed(text) == boxed


def test_a_lone_surrogate_is_no_error():
    for kind in ("deduplicate", "repetition", "language"):
        more = {"allowed": ["en"], "min_characters": 0} if kind == "language" else {}
        reason = verdict({"type": kind, **more}, record("\ud800 half a character"))
        assert reason is None or not reason.startswith("error"), reason
