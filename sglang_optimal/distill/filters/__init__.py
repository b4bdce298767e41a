"""Filters: which samples become training data. Each is a mapping with a ``type`` in the run's file."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sglang_optimal.distill.filters.answer import Answer
from sglang_optimal.distill.filters.base import Filter
from sglang_optimal.distill.filters.chain import FilterChain, Rejection, first_unmet
from sglang_optimal.distill.filters.custom import Function
from sglang_optimal.distill.filters.equations import Equations
from sglang_optimal.distill.filters.mixture import KL, Alpha, Coverage
from sglang_optimal.distill.filters.surprise import Surprise
from sglang_optimal.distill.filters.text import Deduplicate, Finish, Language, Length, Repetition

FILTERS: dict[str, type[Filter]] = {
    "length": Length,
    "finish": Finish,
    "answer": Answer,
    "equations": Equations,
    "repetition": Repetition,
    "language": Language,
    "alpha": Alpha,
    "kl": KL,
    "coverage": Coverage,
    "surprise": Surprise,
    "deduplicate": Deduplicate,
    "function": Function,
}
"""Type in the file: class."""

FilterConfig = Annotated[
    Length
    | Finish
    | Answer
    | Equations
    | Repetition
    | Language
    | Alpha
    | KL
    | Coverage
    | Surprise
    | Deduplicate
    | Function,
    Field(discriminator="type"),
]

__all__ = ["FILTERS", "Filter", "FilterChain", "FilterConfig", "Rejection", "first_unmet"]
