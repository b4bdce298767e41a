"""Do the reference answers pass the run's own answer filters? What they refuse there they refuse in samples too."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

from sglang_optimal.distill.filters import Filter, FilterChain
from sglang_optimal.distill.filters.answer import Answer
from sglang_optimal.distill.leaks import LONG
from sglang_optimal.distill.mentions import last_boxed
from sglang_optimal.distill.problems import Problem
from sglang_optimal.distill.records import Record

FIELDS = ("answer", "solution", "reference")
"""Fields that hold a reference by their names, beside the filter's own and the privileged ones."""
ITSELF, FINAL = "itself", "final"
"""What of a field is taken for a sample: its text as it stands; or what it comes to, in the words of a right sample.
A text passes a filter that compares it with itself, such as ``exact``, where no sample ever would."""
SHOWN = 3
"""Failures that are kept of each field."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """problem: its id. reason: the filter's. text: the reference."""

    problem: str
    reason: str
    text: str


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What one filter says of the texts in one field.

    Attributes:
        filter: its label. field: of the problems. form: `ITSELF` or `FINAL`.
        passed, judged: number of problems whose text passes, and that have one.
        without: number of problems without an expected answer, all of whose samples the filter will reject.
        failures: the first `SHOWN`.
    """

    filter: str
    field: str
    form: str
    passed: int
    judged: int
    without: int
    failures: list[Failure]


def judge_references(
    filters: Sequence[Filter], problems: Sequence[Problem], privileged: Sequence[str]
) -> list[Judgement]:
    """Take each reference for a sample that ended by itself, and ask the answer filters.

    Args:
        filters: of the run; those of the type ``answer`` are asked, each by itself.
        problems: to judge.
        privileged: fields that the student does not see.

    Returns:
        One judgement for each answer filter and field that holds references: the filter's own first, then `FIELDS` and
        the privileged ones. One more of the filter's own, of the final answers in it, where it has any.

    Raises:
        ValueError: a filter cannot be set up.
    """
    judgements = []
    for f in filters:
        if isinstance(f, Answer):
            for field in _fields(f, problems, privileged):
                judgements.append(_judged(f, field, ITSELF, problems))
                if field == f.field and (final := _judged(f, field, FINAL, problems)).judged:
                    judgements.append(final)
    return judgements


def _fields(f: Answer, problems: Sequence[Problem], privileged: Sequence[str]) -> Iterator[str]:
    for name in dict.fromkeys([f.field, *FIELDS, *privileged]):
        if name == f.field or any(_text(problem.fields.get(name)) for problem in problems):
            yield name


def _judged(f: Answer, field: str, form: str, problems: Sequence[Problem]) -> Judgement:
    chain = FilterChain([f])
    passed = judged = without = 0
    failures: list[Failure] = []
    for problem in problems:
        without += not _text(problem.fields.get(f.field))
        text = _text(problem.fields.get(field))
        texts = _said(f, text) if form == FINAL else [text]
        if not text or not texts or not _text(problem.fields.get(f.field)):
            continue
        judged += 1
        records = (Record(problem.id, problem.id, "", 0, problem.fields, "", "", t, [], "stop") for t in texts)
        failed = next(((r.text, rejection) for r in records if (rejection := chain(r)) is not None), None)
        if failed is None:
            passed += 1
        elif len(failures) < SHOWN:
            failures.append(Failure(problem.id, failed[1].reason, failed[0]))
    return Judgement(f.label, field, form, passed, judged, without, failures)


def _text(value: Any) -> str:
    """A text or a number as the filters read it; nothing of what is no single value."""
    return "" if value is None or isinstance(value, bool | dict | list | tuple) else str(value).strip()


def _said(f: Answer, reference: str) -> list[str]:
    """What right samples may say: the reference's final answer, and that without thousands separators. None where it is
    not known, nor in which words the filter looks for it."""
    final = _final(f, reference)
    if not final or f.extract == "pattern":
        return []
    words = "\\boxed{%s}" if f.extract == "boxed" else "%s" if f.match == "exact" else "The answer is %s."
    return [words % form for form in dict.fromkeys((final, re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", final)))]


def _final(f: Answer, reference: str) -> str | None:
    """What a reference comes to, where it says so: by the filter's own pattern, after ``####``, in a box, or all of a
    short one."""
    if f.expected_pattern is not None:
        found = re.findall(f.expected_pattern, reference)
        last = found[-1] if found else None
        return last[0] if isinstance(last, tuple) else last
    if "####" in reference:
        return reference.rpartition("####")[2].strip()
    return last_boxed(reference) or (reference if len(reference) < LONG else None)
