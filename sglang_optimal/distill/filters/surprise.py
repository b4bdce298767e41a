"""Rejects samples in which the student is led to what it would not have written."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from sglang_optimal.distill.filters.base import Filter
from sglang_optimal.distill.records import Record
from sglang_optimal.distill.surprise import RARE, finite_or_impossible, least_logprob, tokens_below

_Probability = Annotated[float, Field(ge=0, le=1)]


class Surprise(Filter):
    """Limits on how much of a sample surprises the student; the mean hides one leap."""

    type: Literal["surprise"]
    min_student_probability: _Probability | None = None
    """Least student probability of the token that surprises most."""
    max_tokens_below_floor: Annotated[int, Field(ge=0)] | None = None
    """Most tokens with a student probability below ``floor``."""
    floor: Annotated[float, Field(gt=0, lt=1)] = RARE
    """A student probability; see ``max_tokens_below_floor``."""
    min_answer_probability: _Probability | None = None
    """Least student probability of the expected answer where the sample first writes it: the product over the tokens
    that write it. The answer is the one that the run's filter ``answer`` compares with, by default the field
    ``answer``. Needs a tokenizer, see ``client.tokenizer``; samples that do not write the answer as it stands are
    rejected."""
    min_log_weight_student: float | None = None
    """Least log importance weight of a sample: the sum over its tokens of student minus mixture logprob, nats."""

    @model_validator(mode="after")
    def _something(self) -> Surprise:
        limits = (
            "min_student_probability", "max_tokens_below_floor", "min_answer_probability", "min_log_weight_student",
        )  # fmt: skip
        if all(getattr(self, name) is None for name in limits):
            raise ValueError(f"{', '.join(limits)}: give at least one of them.")
        if "floor" in self.model_fields_set and self.floor != RARE and self.max_tokens_below_floor is None:
            raise ValueError("floor: only read with max_tokens_below_floor.")
        return self

    @property
    def needs_tokenizer(self) -> bool:
        return self.min_answer_probability is not None

    def check(self, record: Record) -> str | None:
        if len(record.student_logprob) != len(record.token_ids):
            return "no student log-probabilities"
        if not record.token_ids:
            return "no tokens"
        least = self.min_student_probability
        if least is not None and not math.exp(least_logprob(record.student_logprob)) >= least:
            return "a token that surprises the student"
        most = self.max_tokens_below_floor
        if most is not None and tokens_below(record.student_logprob, self.floor) > most:
            return "tokens that surprise the student"
        if self.min_answer_probability is not None:
            if record.answer_probability is None:
                return record.answer_unknown or "the student's probability of the answer is not known"
            if record.answer_probability < self.min_answer_probability:
                return "a leap to the answer"
        if self.min_log_weight_student is not None:
            # −inf of both is no weight.
            weight = math.fsum(
                finite_or_impossible(student) - mixture
                for student, mixture in zip(record.student_logprob, record.mixture_logprob, strict=True)
            )
            if not weight >= self.min_log_weight_student:
                return "a small importance weight"
        return None
