"""Does the sample come to the right answer?"""

from __future__ import annotations

import importlib.util
from typing import Annotated, Literal

from pydantic import Field, model_validator

from sglang_optimal.distill.filters import math_process
from sglang_optimal.distill.filters.base import Check, Filter
from sglang_optimal.distill.mentions import last_boxed, last_group
from sglang_optimal.distill.quantity import equal, last_quantity
from sglang_optimal.distill.records import Record
from sglang_optimal.distill.section import RegularExpression


class Answer(Filter):
    """Compares what the sample says with a field of the problem."""

    type: Literal["answer"]
    match: Literal["exact", "contains", "numeric", "math"] = "exact"
    """``exact``: the same text. ``contains``: the sample has the expected text in it. ``numeric``: the last number
    of both is the same: see `sglang_optimal.distill.quantity`. ``math``: math-verify finds both equal as LaTeX or
    expressions."""
    field: str = "answer"
    """The field with the expected answer."""
    extract: Literal["all", "last_line", "boxed", "pattern"] = "all"
    """The part of the sample that is compared: everything, the last line that is not blank, what is in the last
    ``\\boxed{…}``, or what ``pattern`` finds last."""
    pattern: RegularExpression | None = None
    """Regular expression for ``extract: pattern``; its first group, or the whole match without one."""
    expected_pattern: RegularExpression | None = None
    """The same for the expected answer, such as ``####\\s*(.+)`` for GSM8K; by default all of it."""
    tolerance: Annotated[float, Field(ge=0)] | None = None
    """Relative difference that ``numeric`` allows; by default none between integers, 1e-6 otherwise."""
    ignore_case: bool = False
    """For ``exact`` and ``contains``."""

    @model_validator(mode="after")
    def _consistent(self) -> Answer:
        if (self.pattern is None) == (self.extract == "pattern"):
            raise ValueError("pattern: goes with `extract: pattern`, and only with it.")
        return self

    def ready(self) -> Check:
        if self.match == "math" and importlib.util.find_spec("math_verify") is None:
            raise ModuleNotFoundError("No module named 'math_verify'")
        return self.check

    def check(self, record: Record) -> str | None:
        return self.judge(record.text, record.fields.get(self.field))

    def judge(self, text: str, expected: object) -> str | None:
        """Why ``text`` does not come to the ``expected`` answer; None where it does."""
        if expected is None or not str(expected).strip():
            return f"the problem has no {self.field}"
        expected_text = last_group(self.expected_pattern, str(expected)) if self.expected_pattern else str(expected)
        said = self._extracted(text)
        if said is None or expected_text is None:
            return "no answer found"
        if not expected_text.strip():
            return f"the problem has no {self.field}"
        return self._compare(said, expected_text)

    def _compare(self, said: str, expected: str) -> str | None:
        if self.match == "numeric":
            ours, theirs = last_quantity(said), last_quantity(expected)
            if theirs is None:
                return "the expected answer has no number"
            if ours is None:
                return "no answer found"
            if theirs.value is None and theirs.text is None:
                return "the expected answer is no plain number; use match: math"
            return None if equal(ours, theirs, self.tolerance) else "wrong answer"
        if self.match == "math":
            return self._compared_by_math(said, expected)
        said, expected = said.strip(), expected.strip()
        if self.ignore_case:
            said, expected = said.casefold(), expected.casefold()
        right = said == expected if self.match == "exact" else expected in said
        return None if right else "wrong answer"

    def _compared_by_math(self, said: str, expected: str) -> str | None:
        try:
            return None if math_process.shared().equal(said, expected) else "wrong answer"
        except ValueError as error:
            return f"math-verify: {error}"

    def _extracted(self, text: str) -> str | None:
        if self.extract == "boxed":
            return last_boxed(text)
        if self.extract == "pattern":
            assert self.pattern is not None, "checked with the settings"
            return last_group(self.pattern, text)
        if self.extract == "last_line":
            lines = [line for line in text.splitlines() if line.strip()]
            return lines[-1] if lines else None
        return text
