"""A filter written by the user."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field

from sglang_optimal.distill.filters.base import Check, Filter
from sglang_optimal.distill.records import Record


class Function(Filter):
    """``module:function``; called with the record and ``arguments``.

    It returns True or None to accept; False, or the reason as text, to reject.
    """

    type: Literal["function"]
    function: Annotated[str, Field(pattern=r"^[\w.]+:[\w.]+$")]
    """Importable from the working directory or an installed package."""
    arguments: dict[str, Any] = {}
    """Keyword arguments."""

    def check(self, record: Record) -> str | None:
        return self.ready()(record)

    def ready(self) -> Check:
        function = imported(self.function, "function")

        def check(record: Record) -> str | None:
            verdict = function(record, **self.arguments)
            if verdict is None or verdict is True:
                return None
            if isinstance(verdict, str) and verdict:
                return verdict
            if verdict is False:
                return "refused"
            raise TypeError(f"{self.function} must return True, False, None or a reason; got {verdict!r}")

        return check


def imported(name: str, key: str) -> Callable[..., Any]:
    """The function that ``module:function`` names, from the working directory or an installed package.

    Args:
        name: of the function.
        key: of the settings, for messages.

    Raises:
        ValueError: it cannot be imported, or not be called.
    """
    module, _, path = name.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        function: Any = importlib.import_module(module)
        for part in path.split("."):
            function = getattr(function, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{key}: cannot import {name!r}: {error}") from None
    if not callable(function):
        raise ValueError(f"{key}: {name!r} cannot be called.")
    return function
