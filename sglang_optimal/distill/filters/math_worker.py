"""Are two mathematical answers equal? A program of its own, for `MathProcess`: a line of JSON in, a line of JSON out.

    [said, expected]  →  {"equal": true}  or  {"error": "why there is no verdict"}

It imports nothing of the package, so that it starts in the time that math-verify takes.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
import threading

SECONDS = 5
"""For one parse or one comparison, as math-verify counts them."""
ALONE = 60
"""Seconds of the processor for one verdict, where nobody is left to end this process."""
MEMORY = 4 << 30
"""Bytes of address space: 10^10^10 is no answer that a run may die of."""

_DELIMITED = re.compile(r"\$|\\\(|\\\[|\\boxed|\\fbox|\\begin")
_LATEX = re.compile(r"[\\^_]")


def mathematically_equal(said: str, expected: str) -> bool:
    """Whether math-verify finds the last answer in ``said`` equal to ``expected``: LaTeX, expressions, sets.

    Bare LaTeX, as MATH has it, is taken whole; math-verify by itself would find the first number within.
    """
    from math_verify import verify

    seconds = _seconds()
    gold, answer = _parsed(expected, seconds), _parsed(said, seconds)
    return bool(gold and answer) and verify(gold, answer, timeout_seconds=seconds)


def _seconds() -> int | None:
    # math-verify keeps its time limit with a signal, which only the main thread has.
    return SECONDS if threading.current_thread() is threading.main_thread() else None


def _parsed(text: str, seconds: int | None) -> list:
    from math_verify import parse

    forms = [text, f"${text}$"]
    if _LATEX.search(text) and not _DELIMITED.search(text):
        forms.reverse()
    for form in forms:
        if parsed := parse(form, parsing_timeout=seconds):
            return parsed
    return []


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, ALONE)
        try:
            said, expected = json.loads(line)
            answer: dict[str, object] = {"equal": bool(mathematically_equal(said, expected))}
        except Exception as error:  # the next sample has nothing to do with it
            answer = {"error": f"{type(error).__name__}: {error}"[:200]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
