"""Filters on what the mixture was like: alpha, KL to both models, coverage by the student."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from sglang_optimal.distill.filters.base import Filter
from sglang_optimal.distill.records import Record, mean


class Alpha(Filter):
    """The teacher's weight."""

    type: Literal["alpha"]
    min_mean: float | None = None
    """Least mean alpha of a sample."""
    max_mean: float | None = None
    """Greatest mean alpha of a sample."""
    max_share_above: tuple[float, Annotated[float, Field(ge=0, le=1)]] | None = None
    """[alpha, share]: at most this share of the tokens may have a greater alpha."""

    @model_validator(mode="after")
    def _something(self) -> Alpha:
        return _needs_one(self)

    def check(self, record: Record) -> str | None:
        average = mean(record.alpha)
        if self.min_mean is not None and not average >= self.min_mean:
            return "mean alpha too small"
        if self.max_mean is not None and not average <= self.max_mean:
            return "mean alpha too great"
        if self.max_share_above is not None:
            alpha, share = self.max_share_above
            if mean([a > alpha for a in record.alpha]) > share:
                return f"alpha too often above {alpha:g}"
        return None


class KL(Filter):
    """How far the mixture was from each model, in nats a token."""

    type: Literal["kl"]
    max_mean_to_student: Annotated[float, Field(ge=0)] | None = None
    """Greatest mean of KL(q‖student) over a sample's tokens."""
    max_mean_to_teacher: Annotated[float, Field(ge=0)] | None = None
    """Greatest mean of KL(q‖teacher) over a sample's tokens."""
    max_token_to_student: Annotated[float, Field(ge=0)] | None = None
    """Greatest KL(q‖student) at any token."""

    @model_validator(mode="after")
    def _something(self) -> KL:
        return _needs_one(self)

    def check(self, record: Record) -> str | None:
        # Of a stored record there may be what is needed, and no more.
        if self.max_mean_to_student is not None and not mean(record.kl_to_student) <= self.max_mean_to_student:
            return "far from the student"
        if self.max_mean_to_teacher is not None and not mean(record.kl_to_teacher) <= self.max_mean_to_teacher:
            return "far from the teacher"
        if self.max_token_to_student is not None and max(record.kl_to_student, default=0.0) > self.max_token_to_student:
            return "a token far from the student"
        return None


class Coverage(Filter):
    """How likely the sample is under the student: whether it is on-policy enough to train on."""

    type: Literal["coverage"]
    min_mean_logprob: Annotated[float, Field(le=0)] | None = None
    """Least mean of the student's log-probability of the sample's tokens, in nats."""
    floor: Annotated[float, Field(gt=0, lt=1)] | None = None
    """A student probability; see ``min_share``."""
    min_share: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Least share of the tokens whose student probability is ``floor`` or more."""

    @model_validator(mode="after")
    def _something(self) -> Coverage:
        if self.min_mean_logprob is None and self.floor is None:
            raise ValueError("min_mean_logprob, floor: give at least one of them.")
        return self

    def check(self, record: Record) -> str | None:
        if self.min_mean_logprob is not None and not mean(record.student_logprob) >= self.min_mean_logprob:
            return "unlikely under the student"
        if self.floor is not None:
            least = math.log(self.floor)
            if mean([value >= least for value in record.student_logprob]) < self.min_share:
                return "tokens the student would not write"
        return None


def _needs_one(settings):
    names = [name for name in type(settings).model_fields if name not in ("type", "name")]
    if all(getattr(settings, name) is None for name in names):
        raise ValueError(f"{', '.join(names)}: give at least one of them.")
    return settings
