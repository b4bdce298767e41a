"""The number that a text comes to, exactly."""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from fractions import Fraction

LARGEST_POWER = 400
"""Digits that a power may have and still be worked out."""
LONGEST_NUMBER = 4000
"""Characters of a number that is worked out; a longer one is equal to the same text alone."""


@dataclasses.dataclass(frozen=True)
class Quantity:
    """The last number of a text.

    Attributes:
        value: exactly; None where it is no plain number (10:30, 3-5, 2024-05-08, 3,5) or part of an expression.
        text: as it stands there; None for a part of an expression, which is equal to nothing.
        integer: whether it was written without a fraction.
    """

    value: Fraction | None
    text: str | None
    integer: bool = False


_MINUS = dict.fromkeys(map(ord, "\u2212\ufe63\uff0d\u2010\u2011"), "-")
_NARROW_SPACE = r"[\u00a0\u2009\u202f\u2007]"
_UNITS = {"万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}
_WRAPPERS = re.compile(r"\\(?:boxed|fbox|text|mathrm|mathbf|textbf|operatorname)\s*\{([^{}]*)\}")
_CURRENCY = "$€£¥₹₽₩"

# A number with everything that hangs on it without a space. After a letter it is a name's (x2, m2), after ^ a power of
# something else (m^2); after a root, beside a brace or before a root it is a part of an expression.
_CHUNK = re.compile(
    rf"(?P<open>[√{{]\s*)?(?<![A-Za-z0-9_.^])(?P<sign>(?:(?<![\d)\]])-)?(?:[{_CURRENCY}]\s?-?)?)"
    r"(?P<body>(?:\d+ +(?=\d+/\d))?(?:\d|\.\d)[\d.,:/^'’\-–]*(?:(?<=\d)[eE][+-]?\d+)?)"
    r"(?P<after>\s*[万萬亿億]|\s*(?:\\?}|[√π²³]|\\pi|\\sqrt))?"
)
_PLAIN = re.compile(r"(\d+(?:\.\d+)?|\.\d+)(?:[eE]([+-]?\d+))?")
_FRACTION = re.compile(r"(?:(\d+) +)?(\d+(?:\.\d+)?)/(\d+(?:\.\d+)?)")
_POWER = re.compile(r"(\d+(?:\.\d+)?)\^(-?\d+)")
_GROUPED = (
    (re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?"), ","),  # 1,234,567.8
    (re.compile(r"\d{1,2}(?:,\d{2})+,\d{3}(?:\.\d+)?"), ","),  # 12,34,567.8
    (re.compile(r"\d{1,3}(?:['’]\d{3})+(?:\.\d+)?"), "'’"),  # 1'234'567.8
)
_GROUPED_BY_DOTS = re.compile(r"(\d{1,3}(?:\.\d{3})+),(\d+)|(\d{1,3}(?:\.\d{3}){2,})")  # 1.234,5 and 1.234.567


def last_quantity(text: str) -> Quantity | None:
    """What a text comes to; None without a number.

    Digits of every script, thousands separators, signs and currencies before and behind each other, fractions, mixed
    numbers, powers, 万 and 亿 and LaTeX's forms of these are read. A percent sign and units say nothing: 50 % is 50.
    """
    last = None
    for last in _CHUNK.finditer(_simplified(text)):  # noqa: B007
        pass
    return None if last is None else _read(last)


def equal(said: Quantity, expected: Quantity, tolerance: float | None) -> bool:
    """Whether two quantities are the same.

    Args:
        tolerance: relative difference that is allowed; None: none between integers, 1e-6 otherwise.
    """
    if said.value is None or expected.value is None:
        return said.text is not None and said.text == expected.text
    if tolerance is None and said.integer and expected.integer:
        return said.value == expected.value
    largest = max(abs(said.value), abs(expected.value))
    allowed = Fraction(1, 10**6) if tolerance is None else Fraction(tolerance)
    return abs(said.value - expected.value) <= max(allowed * largest, Fraction(1, 10**12))


def _simplified(text: str) -> str:
    """Digits in ASCII, one minus sign, separators and LaTeX's forms as in plain text."""
    text = text.translate(_MINUS)
    text = re.sub(rf"(\d{{1,3}}(?:{_NARROW_SPACE}\d{{3}})+)(?:,(\d+))?(?!\d)", _grouped, text)
    text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])", " ", text)
    text = "".join(_ascii(character) for character in unicodedata.normalize("NFKC", text.replace("⁄", "/")))
    text = text.replace("٫", ".").replace("٬", ",").translate(_MINUS).replace("\u2044", "/")
    text = re.sub(r"(?<=\d)(?:\{,\}|,?\\[,!;: ]|\{\\,\}|,\\!)(?=\d{3}(?!\d))", ",", text)
    text = re.sub(r"(?<![\d.,])(\d{1,3}(?: \d{3})+)(?![\d/])", lambda match: match[1].replace(" ", ","), text)
    text = _fractions(text)
    text = text.replace("\\left", "").replace("\\right", "").replace("\\$", "$").replace("\\%", "%")
    for _ in range(3):  # one within the other
        text = _WRAPPERS.sub(r" \1 ", text)
    text = re.sub(r"(?<![\\\w])\$(?=\s*-?\d[^$]*\$)|(?<=[\d}])\$", " ", text)  # $7$ is no price
    text = _fractions(text)
    text = re.sub(r"\s*(?:\\times|\\cdot|[×·*])\s*10\s*\^\s*\{?\s*(-?\d+)\s*\}?", r"e\1", text)
    return re.sub(r"(?<=\d)\s*\^\s*\{\s*(-?\d+)\s*\}", r"^\1", text)


_FRAC = re.compile(r"(-?)(?:\s*(?<!\d)(\d+))?\s*\\[dtc]?frac\s*(?:\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d)\s*(\d))")


def _fractions(text: str) -> str:
    # Looking for one takes time with the square of a run of blanks.
    return _FRAC.sub(_fraction, text) if "frac" in text else text


def _grouped(match: re.Match) -> str:
    whole = re.sub(_NARROW_SPACE, "", match[1])
    return f"{whole}.{match[2]}" if match[2] else whole


def _fraction(match: re.Match) -> str:
    sign, whole, a, b, c, d = match.groups()
    return f"{sign}{whole} {a or c}/{b or d}" if whole else f" {sign}{a or c}/{b or d}"


def _ascii(character: str) -> str:
    if character.isascii() or not character.isdecimal():
        return character
    return str(unicodedata.decimal(character))


def _read(match: re.Match) -> Quantity:
    body = re.sub(r"[.,:/^'’\-–]+$", "", match["body"])
    after = (match["after"] or "").strip() if body == match["body"] else ""
    if match["open"] or (after and after not in _UNITS):
        return Quantity(None, None)
    value = plain_number(body)
    if value is None:
        return Quantity(None, match["sign"].strip() + body)
    value *= _UNITS.get(after, 1)
    if match["sign"].count("-") % 2:
        value = -value
    return Quantity(value, body, integer=value.denominator == 1)


def plain_number(body: str) -> Fraction | None:
    """A number as it is written in ASCII: with separators of thousands, as a fraction or a power; None for what is no
    single number, or longer than any that Python reads."""
    if len(body) > LONGEST_NUMBER:
        return None
    for pattern, separators in _GROUPED:
        if pattern.fullmatch(body):
            return Fraction(re.sub(f"[{separators}]", "", body))
    if grouped := _GROUPED_BY_DOTS.fullmatch(body):
        whole, decimals, only = grouped.groups()
        return Fraction((only or whole).replace(".", "") + (f".{decimals}" if decimals else ""))
    if plain := _PLAIN.fullmatch(body):
        if plain[2] is not None and abs(int(plain[2])) > LARGEST_POWER:
            return None
        return Fraction(body)
    if parts := _FRACTION.fullmatch(body):
        whole, above, below = (Fraction(part or 0) for part in parts.groups())
        return whole + above / below if below else None
    if power := _POWER.fullmatch(body):
        base, exponent = Fraction(power[1]), int(power[2])
        small = abs(exponent) * len(power[1]) <= LARGEST_POWER
        return base**exponent if small and (base or exponent >= 0) else None
    return None
