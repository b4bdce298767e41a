"""Where a sample first writes the expected answer."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from sglang_optimal.distill.quantity import Quantity, equal, last_quantity

NO_ANSWER = "the problem has no expected answer"
NO_MENTION = "the expected answer is nowhere in the text"


@dataclasses.dataclass(frozen=True)
class AnswerField:
    """Which field has a problem's expected answer, and what of it: as the run's filter `answer` compares it.

    Attributes:
        field: of the problem.
        expected_pattern: see `sglang_optimal.distill.filters.answer.Answer`.
        match: how answers are compared; None: nothing says so.
        ignore_case: of texts.
    """

    field: str = "answer"
    expected_pattern: str | None = None
    match: str | None = None
    ignore_case: bool = False

    @classmethod
    def of(cls, filters: Sequence[Any]) -> AnswerField:
        """That of the first of a run's filters that compares answers; by default the field ``answer``."""
        for f in filters:
            if f.type == "answer":
                return cls(f.field, f.expected_pattern, f.match, f.ignore_case)
        for f in filters:
            if f.type == "equations":
                return cls(f.field, f.expected_pattern, "numeric")
        return cls()

    def mention(self, fields: dict[str, Any], text: str) -> tuple[int, int] | str:
        """The characters of ``text``, a half-open range, in which it first writes the expected answer; else why not."""
        expected = self._expected(fields.get(self.field))
        if expected is None:
            return NO_ANSWER
        found = _number(expected, text) if isinstance(expected, Quantity) else self._text(expected, text)
        return NO_MENTION if found is None else found

    def _expected(self, value: Any) -> Quantity | str | None:
        """A number, or a text to look for as it is."""
        text = None if value is None else str(value).strip()
        if text and self.expected_pattern is not None:
            text = last_group(self.expected_pattern, text)
        if not text or not text.strip():
            return None
        text = text.strip()
        if self.match in (None, "math"):
            text = concluded(text)
        quantity = last_quantity(text)
        readable = quantity is not None and quantity.value is not None
        whole = re.fullmatch(rf"(?:{_FRACTION.pattern})[\s.%]*", text) is not None
        if readable and (whole or self.match == "numeric" or (self.match is None and len(text.split()) > 1)):
            return quantity
        if self.match == "numeric":
            return None if quantity is None else quantity.text  # such as 10:30
        return text

    def _text(self, expected: str, text: str) -> tuple[int, int] | None:
        pattern = r"\s+".join(re.escape(word) for word in expected.split())
        pattern = rf"(?<!\w){pattern}" if re.match(r"\w", expected) else pattern
        pattern = rf"{pattern}(?!\w|[.,]\d)" if re.search(r"\w\Z", expected) else pattern
        found = re.search(pattern, text, re.IGNORECASE if self.ignore_case or self.match is None else 0)
        return None if found is None else found.span()


def concluded(text: str) -> str:
    """What a worked solution comes to: behind its last ``####``, or in its last ``\\boxed{…}``; else all of it. Without
    the dollars or brackets around a formula."""
    if "####" in text and (tail := text.rpartition("####")[2].strip()):
        return tail
    text = (last_boxed(text) or text).strip()
    delimited = re.fullmatch(r"\$+([^$]*)\$+|\\\((.*)\\\)|\\\[(.*)\\\]", text, re.DOTALL)
    return text if delimited is None else next(part for part in delimited.groups() if part is not None).strip()


def last_group(pattern: str, text: str) -> str | None:
    """The first group of the last match (the whole of it without groups); None without a match."""
    last = None
    for last in re.finditer(pattern, text):  # noqa: B007
        pass
    if last is None:
        return None
    return last.group(1) if last.re.groups else last.group()


_MINUS = r"[-\u2212\ufe63\uff0d\u2010\u2011\u2013]"
_CURRENCY = r"[$€£¥₹₽₩]"
_SEPARATED = r"(?:[.,'’\u00a0\u2009\u202f٫٬]|\{,\}|\\,)\d+| \d{3}(?![\d/])"
_BODY = rf"(?:\d+(?:{_SEPARATED})*|\.\d+)(?:[eE][+-]?\d+|\s?\^\s?\{{?-?\d+\}}?)?[万萬亿億]?"
# A whole number is no part of another (12 of 120 or of 1,200), of a name (x12) or of a time (12:30).
_NUMBER = re.compile(
    rf"(?<!\w)(?<!\w[.:])(?:(?<![\w)\]]){_MINUS}\s?)?(?:{_CURRENCY}\s?{_MINUS}?)?{_BODY}(?![\d:]\d|\d)"
)
# 1/2 writes one half, but 48/2 does not write 24.
_FRACTION = re.compile(
    rf"(?:(?<![\w)\]]){_MINUS}\s?)?(?:(?:\d+\s*)?\\[dtc]?frac\s*(?:\{{\s*\d+\s*\}}\s*\{{\s*\d+\s*\}}|\d\s*\d)"
    rf"|(?<![\w.,/])(?:\d+ +)?\d+\s?/\s?\d+(?![\w/]))|{_NUMBER.pattern}"
)


def _number(expected: Quantity, text: str) -> tuple[int, int] | None:
    pattern = _NUMBER if expected.value is not None and expected.value.denominator == 1 else _FRACTION
    for found in pattern.finditer(text):
        said = last_quantity(found[0])
        if said is not None and equal(said, expected, None):
            price = re.match(rf"{_CURRENCY}(?=[\d.])", found[0])  # its sign is no part of the answer
            return found.start() + (0 if price is None else 1), found.end()
    return None


_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:(?P<brace>\{)|(?P<one>[^\s{}\\]))")


def last_boxed(text: str) -> str | None:
    """What is in the last complete ``\\boxed{…}`` or ``\\fbox{…}`` of ``text``, with braces balanced, or the one
    character that follows without braces; None without one."""
    for box in reversed(list(_BOX.finditer(text))):
        if box["one"] is not None:
            return box["one"]
        depth = 1
        for i in range(box.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[box.end() : i]
    return None
