"""Numbers in text."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"(?<![\w.])-?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?|\d+(?:\.\d+)?")


def numbers(text: str) -> list[float]:
    """Every number in ``text``; a thousands separator is part of its number, and a dash after a word is no sign."""
    return [float(match) for match in _NUMBER.findall(re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text))]
