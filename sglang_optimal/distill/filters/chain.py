"""The filters of a run, in their order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from sglang_optimal.distill.filters.base import Check, Filter
from sglang_optimal.distill.filters.custom import Function
from sglang_optimal.distill.records import NotStored, Record

CHARACTERS = "characters"
"""Rejects, in every run, text with U+FFFD: bytes of a token that are no character, such as the first half of one that
``max_new_tokens`` cut. Such a text is not what was sampled, and no model should learn it."""


@dataclasses.dataclass(frozen=True)
class Rejection:
    """filter: label of the filter that the record failed. reason: why, in a few words."""

    filter: str
    reason: str


class FilterChain:
    """Asks the filters one after the other, until one refuses.

    Raises:
        ValueError: a filter cannot be set up; names it.
    """

    def __init__(self, filters: Sequence[Filter]):
        self._checks: list[tuple[str, Check]] = []
        for f in filters:
            try:
                self._checks.append((f.label, f.ready()))
            except (ValueError, ImportError) as error:
                raise ValueError(f"filters: {f.label}: {error}") from None

    def __call__(self, record: Record) -> Rejection | None:
        """None when the record passes all filters. A filter that raises has refused, with the error as its reason.

        Not for two threads at a time: filters may have a memory.
        """
        if "\ufffd" in record.text:
            cut = record.text.endswith("\ufffd") and record.finish_reason == "length"
            return Rejection(CHARACTERS, "cut inside a character" if cut else "bytes that are no character")
        for label, check in self._checks:
            try:
                reason = check(record)
            except NotStored as error:  # of no sample, but of the run that is filtered again
                error.filter = label
                raise
            except Exception as error:  # one strange sample must not end hours of work
                reason = f"error: {type(error).__name__}: {error}"
            if reason is not None:
                return Rejection(label, reason)
        return None

    def remember(self, accepted: Iterable[tuple[str, str]]) -> None:
        """Tell filters with a memory what a resumed run has accepted: (problem id, text) of each record."""
        memories = [check.remember for _, check in self._checks if hasattr(check, "remember")]
        if memories:
            for problem_id, text in accepted:
                for remember in memories:
                    remember(problem_id, text)

    @property
    def has_memory(self) -> bool:
        return any(hasattr(check, "remember") for _, check in self._checks)


def first_unmet(filters: Sequence[Filter], record: Record) -> tuple[int, NotStored] | None:
    """Which filter is the first to read what the record has not got, and what that is; None without any.

    Users' functions are left out: they are asked in their turn alone, since nobody knows what else they do.
    """
    for i, f in enumerate(filters):
        if isinstance(f, Function):
            continue
        try:
            f.ready()(record)
        except NotStored as error:
            return i, error
        except Exception:  # the chain makes a rejection of it
            pass
    return None
