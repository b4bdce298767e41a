"""Is what the sample works out right?"""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Literal

from pydantic import Field

from sglang_optimal.distill import equations
from sglang_optimal.distill.filters.base import Filter
from sglang_optimal.distill.mentions import last_group
from sglang_optimal.distill.quantity import Quantity, equal, last_quantity
from sglang_optimal.distill.records import Record
from sglang_optimal.distill.section import RegularExpression


class Equations(Filter):
    """Every equation in the sample, such as ``3 + 4 = 7``, is true, there is one at least, and the last one comes to
    the answer: no leap, and no slip on the way. See `sglang_optimal.distill.equations`."""

    type: Literal["equations"]
    min_equations: Annotated[int, Field(ge=0)] = 1
    """Fewest equations."""
    last_is_answer: bool = True
    """The last equation's value is the expected answer, as with ``match: numeric`` of the filter ``answer``."""
    field: str = "answer"
    """The field with the expected answer."""
    expected_pattern: RegularExpression | None = None
    """Regular expression for the expected answer, such as ``####\\s*(.+)``; by default all of it."""
    tolerance: Annotated[float, Field(ge=0)] = 0.0
    """Relative difference that is allowed between the sides of an equation: 0.01 lets 10 / 3 = 3.33 pass."""

    def check(self, record: Record) -> str | None:
        expected = self._expected(record) if self.last_is_answer else None
        if isinstance(expected, str):
            return expected
        found = equations.equations(record.text, Fraction(self.tolerance))
        if not all(equation.true for equation in found):
            return "a false equation"
        if len(found) < max(self.min_equations, 1 if self.last_is_answer else 0):
            return "no equation" if not found else "too few equations"
        if expected is not None and not any(self._same(value, expected) for value in found[-1].values):
            return "the last equation is not the answer"
        return None

    def _expected(self, record: Record) -> Quantity | str:
        """The expected answer, or why there is none."""
        value = record.fields.get(self.field)
        text = None if value is None else str(value)
        if text is not None and self.expected_pattern is not None:
            text = last_group(self.expected_pattern, text)
        if text is None or not text.strip():
            return f"the problem has no {self.field}"
        quantity = last_quantity(text)
        if quantity is None or quantity.value is None:
            return "the expected answer is no number"
        return quantity

    def _same(self, value: Fraction, expected: Quantity) -> bool:
        said = Quantity(value, None, integer=value.denominator == 1)
        return equal(said, expected, self.tolerance or None)
