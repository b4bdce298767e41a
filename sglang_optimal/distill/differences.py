"""What one side reads and the other does not, word by word."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence

SAME, STUDENT, TEACHER = "same", "student", "teacher"
Part = tuple[str, str]
"""(`SAME`, `STUDENT` or `TEACHER`, a text that both read, or that one alone does)"""

LONGEST = 2000
"""Words of a changed passage that are compared one by one: the comparison takes their number squared."""


def differences(student: str, teacher: str) -> list[Part]:
    """The parts of two texts in their order. The texts of `SAME` and `STUDENT` are the student's, those of `SAME` and
    `TEACHER` the teacher's."""
    parts: list[Part] = []
    for kind, text in _by_lines(student.splitlines(keepends=True), teacher.splitlines(keepends=True)):
        if parts and parts[-1][0] == kind:
            parts[-1] = (kind, parts[-1][1] + text)
        else:
            parts.append((kind, text))
    return parts


def _by_lines(student: Sequence[str], teacher: Sequence[str]) -> Iterator[Part]:
    for equal, ours, theirs in _blocks(student, teacher):
        mine, yours = _words(ours), _words(theirs)
        if equal:
            yield SAME, ours
        elif len(mine) > LONGEST or len(yours) > LONGEST:
            yield from _one_sided(ours, theirs)
        else:
            for same, a, b in _blocks(mine, yours):
                yield from [(SAME, a)] if same else _one_sided(a, b)


def _blocks(a: Sequence[str], b: Sequence[str]) -> Iterator[tuple[bool, str, str]]:
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    for kind, a1, a2, b1, b2 in matcher.get_opcodes():
        yield kind == "equal", "".join(a[a1:a2]), "".join(b[b1:b2])


def _one_sided(student: str, teacher: str) -> Iterator[Part]:
    if student:
        yield STUDENT, student
    if teacher:
        yield TEACHER, teacher


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|\s|[^\w\s]", text)
