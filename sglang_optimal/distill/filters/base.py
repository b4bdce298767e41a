"""What every filter has."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Annotated

from pydantic import Field

from sglang_optimal.distill.records import Record
from sglang_optimal.distill.section import Section

Check = Callable[[Record], str | None]
"""None when the record passes, else why not."""


class Filter(Section, abc.ABC):
    """Settings of one filter. ``type`` is set by each class."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] | None = None
    """Name in the report and in rejected records; by default the type."""

    @property
    def label(self) -> str:
        return self.name or self.type  # type: ignore[attr-defined]

    @property
    def needs_tokenizer(self) -> bool:
        """Whether it reads `Record.answer_probability`, which a tokenizer is needed for."""
        return False

    @abc.abstractmethod
    def check(self, record: Record) -> str | None:
        """None when the record passes, else why not, in a few words."""

    def ready(self) -> Check:
        """The check, with what it needs loaded, and with the state of one run where it has any.

        Raises:
            ValueError: something it needs is missing.
        """
        return self.check
