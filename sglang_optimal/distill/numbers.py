"""Numbers in text."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"(?<![\w.])-?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?|\d+(?:\.\d+)?")


def numbers(text: str) -> list[float]:
    """Every number in ``text``; a thousands separator is part of its number, and a dash after a word is no sign."""
    return [float(match) for match in _NUMBER.findall(re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text))]


def last_number(text: str) -> float | None:
    """What a text comes to; None without a number."""
    found = numbers(text)
    return found[-1] if found else None
