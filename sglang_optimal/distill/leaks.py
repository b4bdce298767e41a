"""Finds a privileged value in what the student reads."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

from sglang_optimal.distill.mentions import last_boxed

LONG = 16
"""Values of this many characters or more are looked for as they are: a shorter one, such as a number, may well stand in
a problem by chance, and is a leak where something announces it."""

# What announces an answer: "The answer is 72", "**Answer:** 72", "#### 72", "\boxed{72}", "答案：72". A bare "= 72"
# does not: problems say "x = 72" of what is given.
_ANNOUNCED = (
    r"(?:answer|solution|result)s?[\"'*_)\]]*\s*(?:(?:is|are|was|be|equals)\b|:|=|→|->|\|)+[\s\"'*_(\[$]*{value}(?![\w.]*\w)",
    r"####\s*[$]?{value}(?![\w.]*\w)",
    r"\\(?:boxed|fbox)\s*\{{\s*{value}\s*\}}",
    r"(?:答案|结果|解答)\s*(?:是|为|:|=)+\s*{value}(?!\w)",
)


def leaves(value: Any) -> Iterator[str]:
    """Every text, number and date in a value, lists and mappings taken apart, and what a worked solution comes to."""
    if isinstance(value, dict):
        for inner in value.values():
            yield from leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from leaves(inner)
    elif value is not None and not isinstance(value, bool):
        text = str(value).strip()
        yield text
        yield from _conclusions(text)


def _conclusions(text: str) -> Iterator[str]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 1:
        yield from lines[-2:] if lines[-1].startswith("####") else lines[-1:]
    if "####" in text:
        yield text.rpartition("####")[2].strip()
    boxed = last_boxed(text)
    if boxed:
        yield boxed.strip()


def leaked(value: Any, text: str) -> str | None:
    """The part of ``value`` that ``text`` gives away; None where there is none."""
    readings = _readings(text)
    for leaf in dict.fromkeys(leaves(value)):
        if not leaf:
            continue
        needle = _plain(leaf)
        if len(needle) >= LONG:
            if any(needle in reading for reading in readings):
                return leaf
        elif any(
            re.search(form.format(value=re.escape(needle)), reading, re.IGNORECASE)
            for form in _ANNOUNCED
            for reading in readings
        ):
            return leaf
    return None


def mentioned(value: Any, text: str) -> bool:
    """Whether ``text`` has a short part of ``value`` as a word of its own: by chance, or not."""
    reading = _plain(text)
    needles = {_plain(leaf) for leaf in leaves(value)}
    return any(re.search(rf"(?<!\w){re.escape(n)}(?!\w)", reading) for n in needles if 0 < len(n) < LONG)


def _readings(text: str) -> list[str]:
    """The text, and what it says without HTML's and JSON's escapes."""
    forms = [text, html.unescape(text), text.replace('\\"', '"').replace("\\n", "\n").replace("\\\\", "\\")]
    return list(dict.fromkeys(map(_plain, forms)))


def _plain(text: str) -> str:
    """One white space, one form of each character, one case."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
