"""One text against one answer, as the page at ``/mixing`` shows it: a run's `answer` filter decides."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from sglang_optimal.distill.filters.answer import Answer
from sglang_optimal.distill.quantity import Quantity, last_quantity

LONGEST_WORDS = 80
"""Characters of an answer without a number that a text may be searched for; a longer one is a text of its own."""
LONGEST_TEXT = 8000
"""Characters, from the end, that are looked at: a server's event loop waits for a regular expression."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a text comes to an answer.

    Attributes:
        verdict: ``none``: the text has no number to compare. ``unjudged``: the answer has nothing to compare with.
        match: the filter's, ``numeric`` where the answer has a number, else ``contains``; None for ``unjudged``.
        said, expected: what was compared; None where there is nothing of the kind.
    """

    verdict: Literal["right", "wrong", "none", "unjudged"]
    match: Literal["numeric", "contains"] | None
    said: str | None
    expected: str | None


def judged(text: str, answer: str) -> Verdict:
    """Compare the last number of both, or look for an answer in words.

    The comparison is that of ``{type: answer, match: numeric}``, for an answer without a plain number that of
    ``{type: answer, match: contains, ignore_case: true}``; an answer in words must be one line of at most
    `LONGEST_WORDS` characters.

    Example:
        >>> judged("So he pays 1,080 dollars.", "12 * 90 = 1080. The answer is 1080.").verdict
        'right'
        >>> judged("It is Sydney.", "Canberra")
        Verdict(verdict='wrong', match='contains', said=None, expected='Canberra')
    """
    text, answer = _bounded(text), _bounded(answer)
    expected = last_quantity(answer)
    if expected is not None and expected.text is not None:
        said = last_quantity(text)
        reason = Answer(type="answer", match="numeric").judge(text, answer)
        result: Literal["right", "wrong", "none"] = "right" if reason is None else "none" if said is None else "wrong"
        return Verdict(result, "numeric", _written(said), _written(expected))
    words = answer.strip().rstrip(".").rstrip()
    if expected is not None or not words or len(words) > LONGEST_WORDS or len(words.splitlines()) > 1:
        return Verdict("unjudged", None, None, None)
    found = Answer(type="answer", match="contains", ignore_case=True).judge(text, words) is None
    return Verdict("right" if found else "wrong", "contains", words if found else None, words)


def _bounded(text: str) -> str:
    return re.sub(r"\s{9,}", lambda run: run[0][:8], text[-LONGEST_TEXT:])


def _written(number: Quantity | None) -> str | None:
    if number is None or number.text is None:
        return None
    return f"−{number.text}" if number.value is not None and number.value < 0 else number.text
