"""Which of the accepted samples of a problem are kept: the best few, by a number that each has."""

from __future__ import annotations

import hashlib
import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from sglang_optimal.distill.filters.custom import imported
from sglang_optimal.distill.records import Record
from sglang_optimal.distill.section import Section

SELECT = "select"
"""Rejects what was not among the best, in the place of a filter's label."""

BY = {
    "importance_weight": "importance weight",
    "importance_resampling": "importance resampling",
    "length": "length",
    "reward": "reward",
}
"""What samples are ordered by: its name in reasons."""

Scored = Callable[[Record, dict[str, Any]], float]
"""The higher the better; of a record and its stored row."""


class Select(Section):
    """The best samples of each problem among those that the filters accept; the others are rejected. For
    ``distill filter``: a run that samples has not got all samples of a problem yet."""

    best: Annotated[int, Field(gt=0)] = 1
    """How many of a problem are kept, over all strategies. Ties are decided by id."""
    by: Literal["importance_weight", "importance_resampling", "length", "reward"] = "importance_weight"
    """``importance_weight``: the highest ``log_weight_student``. ``importance_resampling``: drawn without replacement,
    each with a probability in proportion to its weight under the student. ``length``: the fewest tokens. ``reward``:
    the highest ``reward``."""
    reward: Annotated[str, Field(min_length=1)] | None = None
    """For ``by: reward``: a column or a field of the problem with numbers, or ``module:function``, called with the
    record."""
    seed: int = 0
    """Of ``importance_resampling``."""

    @model_validator(mode="after")
    def _consistent(self) -> Select:
        if (self.reward is not None) != (self.by == "reward"):
            raise ValueError("reward: goes with `by: reward`, and only with it.")
        return self

    @property
    def reason(self) -> str:
        """Why a sample was rejected."""
        return f"not among the best {self.best} of its problem by {BY[self.by]}"

    def score(self) -> Scored:
        """What samples are ordered by, highest first; −inf for one that has no number there (null).

        Raises:
            ValueError: the function of ``reward`` cannot be imported; and when called: there is no number.
        """
        if self.by == "length":
            return lambda record, row: -len(record.token_ids)
        if self.by == "importance_weight":
            return lambda record, row: _number(row["log_weight_student"], record, "log_weight_student")
        if self.by == "importance_resampling":
            return self._resampled
        assert self.reward is not None, "checked with the settings"
        if ":" in self.reward:
            return self._judged_by(imported(self.reward, "select.reward"))
        return self._rewarded

    def _judged_by(self, function: Callable[[Record], Any]) -> Scored:
        def score(record: Record, row: dict[str, Any]) -> float:
            try:
                value = function(record)
            except Exception as error:  # the user's code
                raise ValueError(
                    f"select.reward: {self.reward} fails on {record.id}: {type(error).__name__}: {error}"
                ) from error
            return _number(value, record, self.reward)

        return score

    def _resampled(self, record: Record, row: dict[str, Any]) -> float:
        """The keys of the k largest of which are a sample without replacement, by weight (Gumbel-top-k: Efraimidis and
        Spirakis 2006, Kool et al. 2019, arXiv 1903.06059). With ``best: 1`` it is sampling importance resampling (Rubin
        1987): as samples grow in number, the one that is kept is the student's own, given that it is accepted."""
        digest = hashlib.sha256(f"{self.seed}/{record.id}".encode(errors="replace")).digest()
        uniform = (int.from_bytes(digest[:8], "big") + 0.5) / 2**64
        uniform = min(uniform, math.nextafter(1.0, 0.0))
        return _number(row["log_weight_student"], record, "log_weight_student") - math.log(-math.log(uniform))

    def _rewarded(self, record: Record, row: dict[str, Any]) -> float:
        name = self.reward
        if name not in row and name not in record.fields:
            raise ValueError(f"select.reward: {record.id} has neither a column nor a field {name!r}.")
        return _number(row[name] if name in row else record.fields[name], record, name)


def _number(value: Any, record: Record, name: str | None) -> float:
    if value is None:
        return -math.inf
    if isinstance(value, bool | int | float) and not math.isnan(value):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    raise ValueError(f"select: {name} of {record.id} must be a number, got {str(value)[:80]!r}.")


class Chosen:
    """The best of each problem.

    Args:
        select: the settings.
    """

    def __init__(self, select: Select):
        self._best, self._score = select.best, select.score()
        self._of: defaultdict[str, list[tuple[float, str]]] = defaultdict(list)

    def offer(self, record: Record, row: dict[str, Any]) -> None:
        """Of an accepted record and its row. Raises ValueError: it has no number to be ordered by."""
        self._of[record.problem_id].append((-self._score(record, row), record.id))

    def ids(self) -> set[str]:
        """Of the records that are kept."""
        return {name for of in self._of.values() for _, name in _smallest(self._best, of)}


def _smallest(count: int, of: Iterable[tuple[float, str]]) -> list[tuple[float, str]]:
    return heapq.nsmallest(count, of)
