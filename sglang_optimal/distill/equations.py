"""Finds the equations of a text, and works them out exactly.

An equation is two sides with ``=`` between them, both of numbers alone, at least one with an operator:
``3 + 4 = 7``, ``7 = 3 + 4``, ``2 * (3 + 4) = 14``; ``a + b = c = d`` is two of them. Nothing is ever evaluated as code.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction

from sglang_optimal.distill.quantity import LARGEST_POWER, plain_number


@dataclasses.dataclass(frozen=True)
class Equation:
    """text: as it was read, with operators in ASCII. true: both sides are the same. values: what the right side may
    stand for: itself, and for a lone ``20%`` also 20; empty where it cannot be worked out (a division by zero)."""

    text: str
    true: bool
    values: tuple[Fraction, ...]


def equations(text: str, tolerance: Fraction = Fraction(0)) -> list[Equation]:
    """The equations of a text, in their order.

    Args:
        text: prose with equations in it. Words behind numbers are units and say nothing, as are signs of currencies;
            20% is 0.2, or 20 where it stands alone against a side without a percent sign. A side with anything else in
            it (``2x + 3``, ``√16 + 1``, ``1,5 + 2``) makes no equation.
        tolerance: relative difference that is allowed between the sides.
    """
    return [found for line in _simplified(text).splitlines() for found in _of_line(line, tolerance)]


_REPLACED = str.maketrans(
    {
        **dict.fromkeys("\u2212\ufe63\uff0d\u2010\u2011\u2013", "-"),
        **dict.fromkeys("×✕✖·⋅∙", "*"),
        **dict.fromkeys("÷∕\u2044", "/"),
        **dict.fromkeys("$€£¥₹₽₩", ""),
        **dict.fromkeys("\u00a0\u2009\u202f\u2007", " "),
    }
)  # fmt: skip
_LATEX = (
    (re.compile(r"\\(?:times|cdot|ast)\b"), "*"),
    (re.compile(r"\\div\b"), "/"),
    (re.compile(r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"((\1)/(\2))"),
    (re.compile(r"\\(?:text|mathrm|mathbf|textbf|boxed|fbox)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\left|\\right"), ""),
    (re.compile(r"\\[()\[\]]"), " "),
    (re.compile(r"\\([%$])"), r"\1"),
    (re.compile(r"\{,\}|\\,(?=\d{3})"), ","),
    (re.compile(r"\\[,;:! ]|\\quad\b"), " "),
)
_BULLET = re.compile(r"^\s*(?:[-*+•‣]\s+|\d+[.)]\s+)+", re.MULTILINE)


def _simplified(text: str) -> str:
    text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])", " ", text)  # two and a half
    for pattern, replacement in _LATEX[2:3] * 2 + _LATEX:
        text = pattern.sub(replacement, text)
    for operator, plain in (("²", "^2"), ("³", "^3"), ("·", "*")):  # which NFKC would make 2, 3 and nothing of
        text = text.replace(operator, plain)
    text = unicodedata.normalize("NFKC", text).translate(_REPLACED)
    text = "".join(str(unicodedata.decimal(c)) if c.isdecimal() and not c.isascii() else c for c in text)
    text = re.sub(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d/])", lambda found: found[0].replace(" ", ","), text)
    return _BULLET.sub("", text)


@dataclasses.dataclass(frozen=True)
class _Token:
    """kind: number, op, open, close, equals, word, percent or other. start: place in the line. glued: no blank before
    it."""

    kind: str
    text: str
    start: int
    glued: bool
    value: Fraction | None = None


_TOKEN = re.compile(
    r"(?P<number>\d+ +\d+/\d+(?![\d.,]*\d)|\d[\d.,'’]*|\.\d[\d.,]*)"
    r"|(?P<other>[!<>≤≥≠≈:]=|=>|={3,}|->|[<>]{2})"
    r"|(?P<equals>==?)"
    r"|(?P<op>\*\*(?=\s*[\d(-])|[-+*/^])"
    r"|(?P<open>[(\[])|(?P<close>[)\]])|(?P<percent>%)"
    r"|(?P<word>[^\W\d_]+(?:[-/'’][^\W\d_]+)*(?:\^\{?-?\d+\}?)?\.?(?=\s*[-+*/=)]))"
    r"|(?P<letters>[^\W\d_]+(?:['’][^\W\d_]+)*(?:\^\{?-?\d+\}?)?)"
    r"|(?P<rest>\S)"
)


def _tokens(line: str) -> list[_Token]:
    tokens: list[_Token] = []
    end = place = 0
    while (found := _TOKEN.search(line, place)) is not None:
        kind, text, start = found.lastgroup or "rest", found[0], found.start()
        place = found.end()
        value = None
        if kind == "number":
            text = text.rstrip(".,'’")
            place = start + len(text)
            value = _number(text)
            if value is None:
                kind = "other"
        elif kind in ("word", "letters"):
            kind = "word"
            before = tokens[-1].kind if tokens else ""
            times = text in "xX" and before in _ENDS and re.match(r"\s*[\d.(]", line[place:])
            if times or (text.lower() == "of" and before == "percent"):
                kind, text = "op", "*"
        elif kind == "op" and text == "**":
            text = "^"
        elif kind == "rest":
            kind = "other"
        tokens.append(_Token(kind, text, start, start == end and start > 0, value))
        end = place
    return tokens


_ENDS = ("number", "close", "percent", "word")
"""Kinds that an operand may end with."""


def _number(text: str) -> Fraction | None:
    if len(text) > LARGEST_POWER:
        return None
    whole, _, part = text.partition(" ")
    if part:
        above, below = part.strip().split("/")
        return Fraction(whole) + Fraction(int(above), int(below)) if int(below) else None
    return plain_number(text)


def _of_line(line: str, tolerance: Fraction) -> Iterator[Equation]:
    tokens = _tokens(line)
    for i, token in enumerate(tokens):
        if token.kind != "equals":
            continue
        left, right = _side(_before(tokens, i)), _side(_after(tokens, i))
        if left is None or right is None or not (left.operators or right.operators):
            continue
        true = any(_equal(a, b, tolerance) for a in left.values(right) for b in right.values(left))
        yield Equation(f"{left.text} = {right.text}", true, right.readings)


def _equal(a: Fraction, b: Fraction, tolerance: Fraction) -> bool:
    return abs(a - b) <= tolerance * max(abs(a), abs(b))


def _before(tokens: list[_Token], i: int) -> list[_Token] | None:
    """The tokens that make the side that ends before the place ``i``; None where what is before them belongs to them
    and cannot be read."""
    start, depth = i, 0
    while start > 0:
        token, following = tokens[start - 1], tokens[start]
        if token.kind == "close":
            depth += 1
        elif token.kind == "open":
            if depth == 0:
                break
            depth -= 1
        elif token.kind == "word":
            if not _is_unit(tokens, start - 1) or following.kind not in ("op", "equals", "close", "word"):
                break
        elif token.kind not in ("number", "op", "percent"):
            break
        start -= 1
    side = tokens[start:i]
    if not side or depth:
        return None
    first, previous = side[0], tokens[start - 1] if start else None
    if first.kind == "op":
        if first.text == "-" and side[1:2] and side[1].glued and not (previous and first.glued and _sticks(previous)):
            return side  # a sign
        emphasis = first.text == "*" and side[1:2] and side[1].glued and not (previous and first.glued)
        return side[1:] if previous is None or emphasis else None
    return None if previous is not None and first.glued and _sticks(previous) else side


def _sticks(token: _Token) -> bool:
    """Whether a number right behind it is a part of something that cannot be read, such as √16, 1:30 or x2."""
    return token.kind in ("word", "number", "percent", "close") or token.text in _STICKY


_STICKY = tuple("√∛^_\\.,:#@&!")


def _after(tokens: list[_Token], i: int) -> list[_Token] | None:
    """The same behind it."""
    end, opened = i + 1, list[int]()
    while end < len(tokens):
        token = tokens[end]
        if token.kind == "open":
            if end > i + 1 and tokens[end - 1].kind in _ENDS and not token.glued:
                break  # a remark
            opened.append(end)
        elif token.kind == "close":
            if not opened:
                break
            opened.pop()
        elif token.kind == "word":
            if not _is_unit(tokens, end):
                break
        elif token.kind == "number":
            if end > i + 1 and tokens[end - 1].kind in ("number", "percent", "word", "close"):
                break
        elif token.kind not in ("op", "percent"):
            break
        end += 1
    end = opened[0] if opened else end
    while end > i + 1 and tokens[end - 1].kind == "op":  # a dash
        end -= 1
    side = tokens[i + 1 : end]
    if not side:
        return None
    follows = tokens[end] if end < len(tokens) else None
    if follows is not None and follows.glued and side[-1].kind == "number":
        last = end + 1 == len(tokens) or not tokens[end + 1].glued
        if follows.kind == "word" or follows.text in ("^", "\\") or (follows.text in (":", "!") and not last):
            return None
        if follows.text == "!" and len(side) > 1:  # a factorial, perhaps
            return None
    return side


_VARIABLES = set("xyzn")


def _is_unit(tokens: list[_Token], place: int) -> bool:
    """Whether a word is the unit of the number before it: ``5 apples``, ``5 km/h``, ``5 red apples``, not ``2x``."""
    before = tokens[place - 1] if place else None
    if before is None or before.kind not in ("number", "percent", "close", "word"):
        return False
    word = tokens[place].text.rstrip(".")
    if len(word) == 1 and (tokens[place].glued or word.lower() in _VARIABLES):
        return False
    if before.kind == "word":  # of two words the first stands behind the number
        return place > 1 and tokens[place - 2].kind in ("number", "percent", "close")
    return True


@dataclasses.dataclass(frozen=True)
class _Side:
    """value: with 20% as 0.2; None where it cannot be worked out. lone: 20 where the side is 20% and no more."""

    text: str
    operators: int
    value: Fraction | None
    percent: bool
    lone: Fraction | None

    @property
    def readings(self) -> tuple[Fraction, ...]:
        return tuple(value for value in (self.value, self.lone) if value is not None)

    def values(self, other: _Side) -> tuple[Fraction, ...]:
        """What it may stand for beside another side."""
        return self.readings[:1] if other.percent else self.readings


class _Unreadable(Exception):
    """The side is no expression."""


class _Impossible(Exception):
    """It has no value: a division by zero, or a power that is too large."""


def _side(tokens: list[_Token] | None) -> _Side | None:
    if tokens is None:
        return None
    tokens = [token for token in tokens if token.kind != "word"]
    parser = _Parser(tokens)
    try:
        tree = parser.parsed()
    except _Unreadable:
        return None
    try:
        value: Fraction | None = _worked_out(tree)
    except _Impossible:
        value = None
    percent = any(token.kind == "percent" for token in tokens)
    lone = value * 100 if value is not None and percent and not parser.operators else None
    return _Side(" ".join(token.text for token in tokens), parser.operators, value, percent, lone)


_Tree = Fraction | tuple
"""A number, or an operator with its operands."""
_DEEPEST, _LONGEST = 50, 400
"""Brackets within each other, and tokens, of a side that is still read."""


class _Parser:
    """Sums, products, powers, brackets and signs, by recursive descent."""

    def __init__(self, tokens: list[_Token]):
        self._tokens, self._place, self._depth = tokens, 0, 0
        self.operators = 0

    def parsed(self) -> _Tree:
        """Raises _Unreadable."""
        if len(self._tokens) > _LONGEST:
            raise _Unreadable
        tree = self._sum()
        if self._place < len(self._tokens):
            raise _Unreadable
        return tree

    def _next(self, kind: str) -> _Token | None:
        """The next token, taken, if it is of this kind."""
        token = self._tokens[self._place] if self._place < len(self._tokens) else None
        if token is None or token.kind != kind:
            return None
        self._place += 1
        return token

    def _operator(self, *texts: str) -> str | None:
        token = self._next("op")
        if token is None or token.text in texts:
            return None if token is None else token.text
        self._place -= 1
        return None

    def _sum(self) -> _Tree:
        tree = self._product()
        while (operator := self._operator("+", "-")) is not None:
            self.operators += 1
            tree = (operator, tree, self._product())
        return tree

    def _product(self) -> _Tree:
        tree = self._signed()
        while True:
            following = self._tokens[self._place] if self._place < len(self._tokens) else None
            operator = self._operator("*", "/")
            if operator is None and (following is None or following.kind != "open" or not following.glued):
                return tree  # 2(3 + 4) is a product, 2 (3 + 4) is none
            self.operators += 1
            tree = (operator or "*", tree, self._signed())

    def _signed(self) -> _Tree:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise _Unreadable
        sign = self._operator("-", "+")
        tree = self._power() if sign is None else self._signed()
        self._depth -= 1
        return ("-", Fraction(0), tree) if sign == "-" else tree

    def _power(self) -> _Tree:
        base = self._operand()
        if self._operator("^") is None:
            return base
        self.operators += 1
        return ("^", base, self._signed())

    def _operand(self) -> _Tree:
        number = self._next("number")
        if number is not None and number.value is not None:
            tree: _Tree = number.value
        elif self._next("open") is not None:
            tree = self._sum()
            if self._next("close") is None:
                raise _Unreadable
        else:
            raise _Unreadable
        return ("/", tree, Fraction(100)) if self._next("percent") is not None else tree


def _worked_out(tree: _Tree) -> Fraction:
    """Raises _Impossible."""
    if isinstance(tree, Fraction):
        return tree
    operator, a, b = tree[0], _worked_out(tree[1]), _worked_out(tree[2])
    if operator == "+":
        return a + b
    if operator == "-":
        return a - b
    if operator == "*":
        return a * b
    if operator == "/":
        if not b:
            raise _Impossible
        return a / b
    digits = max(len(str(a.numerator)), len(str(a.denominator)))
    if b.denominator != 1 or abs(b) * digits > LARGEST_POWER or (not a and b < 0):
        raise _Impossible
    return a ** int(b)
