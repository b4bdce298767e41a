"""Values of the data in templates: shown as their file has them, and never as the word "None"."""

from __future__ import annotations

from typing import Any

import jinja2
import jinja2.sandbox

from sglang_optimal.distill.tables import written_json


class MissingValue(ValueError):
    """A template shows a value that the problem has not got."""


class Missing:
    """A null in a template: false, equal to none, and an error as soon as it would become text (``~``, ``upper`` and
    all other ways that Python makes a text of a value)."""

    def __bool__(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return other is None or isinstance(other, Missing)

    def __hash__(self) -> int:
        return hash(None)

    def __str__(self) -> str:
        raise MissingValue("a value that the template shows is missing (null, or an empty cell).")

    __repr__ = __html__ = __str__

    def __format__(self, _spec: str) -> str:
        return str(self)


def or_missing(value: Any) -> Any:
    """`Missing` in place of None."""
    return Missing() if value is None else value


def shown(value: Any) -> Any:
    """Jinja's ``finalize``: a value as a template shows it."""
    if isinstance(value, str | jinja2.Undefined):  # an undefined one raises by itself
        return value
    if value is None or isinstance(value, Missing):
        return str(Missing())
    if isinstance(value, bool | dict | list | tuple):
        return written_json(value)
    return str(value)


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja for templates over the data. Sandboxed: a configuration may come from someone else."""

    def __init__(self) -> None:
        super().__init__(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False, finalize=shown)
        self.globals.clear()  # a column may have the name of one
        self.tests["none"] = lambda value: value is None or isinstance(value, Missing)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Nulls within a field are missing too."""
        return or_missing(super().getitem(obj, argument))

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Nulls within a field are missing too."""
        return or_missing(super().getattr(obj, attribute))
