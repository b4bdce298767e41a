"""The fields of a mixed request about what is to come back of each token."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

from sglang_optimal.config import check_known
from sglang_optimal.names import ALL_SERIES, MAX_TOP_K, MORE_SERIES, SERIES, SIDES
from sglang_optimal.top_k import FORMATS

TOP_K_FIELDS = ("return_top_k", "top_k_of", "top_k_format")
LARGEST_TOP_K = 2_000_000
"""Most likely tokens in one answer, over all output tokens and sides; as lists about 150 MB of JSON."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is to come back of each token beside alpha: for one request, or for all of a batch together.

    Attributes:
        series: names in `ALL_SERIES`, in that order.
        top_k: how many tokens of each of ``sides``; 0: none.
        top_k_format: ``lists`` or ``base64``.
    """

    series: tuple[str, ...] = ()
    top_k: int = 0
    sides: tuple[str, ...] = ()
    top_k_format: str = "lists"

    @classmethod
    def by_all(cls, parts: Iterable[Wanted]) -> Wanted:
        parts = list(parts)
        series = {name for part in parts for name in part.series}
        sides = {side for part in parts for side in part.sides}
        return cls(
            tuple(name for name in ALL_SERIES if name in series),
            max((part.top_k for part in parts), default=0),
            tuple(side for side in SIDES if side in sides),
        )

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The series that come back: alpha does unasked."""
        return tuple(name for name in self.columns if name == "alpha" or name in self.series)

    @property
    def more_series(self) -> tuple[str, ...]:
        """Those that `mix` does not give."""
        return tuple(name for name in self.series if name in MORE_SERIES)

    @functools.cached_property
    def columns(self) -> tuple[str, ...]:
        """The series of a token as they leave the device: what `mix` gives always comes."""
        return SERIES + self.more_series


def wanted_by(fields: dict[str, Any]) -> Wanted:
    """What a request wants to know of each token.

    Raises:
        ValueError: names the field and the fix.
    """
    return Wanted(_series_of(fields.get("return_mixing_info")), *_top_k_of(fields))


def _series_of(value: Any) -> tuple[str, ...]:
    """``return_mixing_info``: true is what there was before names could be given."""
    if value is None or isinstance(value, bool):
        return SERIES if value else ()
    if not isinstance(value, list | tuple):
        raise ValueError(f"return_mixing_info: must be true or false, or a list of series, got {value!r}.")
    for name in value:
        if not isinstance(name, str):
            raise ValueError(f"return_mixing_info: a series is a name, got {name!r}.")
    check_known(dict.fromkeys(value), ALL_SERIES, "return_mixing_info")
    return tuple(name for name in ALL_SERIES if name in value)


def _top_k_of(fields: dict[str, Any]) -> tuple[int, tuple[str, ...], str]:
    k, sides, form = (fields.get(name) for name in TOP_K_FIELDS)
    if k is None:
        k = 0
    if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= MAX_TOP_K:
        raise ValueError(f"return_top_k: must be an integer from 0 to {MAX_TOP_K}, got {k!r}.")
    for name, value in (("top_k_of", sides), ("top_k_format", form)):
        if value is not None and "return_top_k" not in fields:
            raise ValueError(f"{name}: only read with return_top_k.")
    sides = [sides] if isinstance(sides, str) else ["teacher", "student"] if sides is None else sides
    if not isinstance(sides, list | tuple) or not sides:
        raise ValueError(f"top_k_of: must be one of {', '.join(SIDES)} or a list of them, got {sides!r}.")
    for side in sides:
        if side not in SIDES:
            raise ValueError(f"top_k_of: {side!r} is not one of {', '.join(SIDES)}.")
    form = "lists" if form is None else form
    if form not in FORMATS:
        raise ValueError(f"top_k_format: must be one of {', '.join(FORMATS)}, got {form!r}.")
    return k, tuple(side for side in SIDES if side in sides) if k else (), form


def check_amount(wanted: Wanted, tokens: int) -> None:
    """Refuse an answer too large to be made and sent.

    Raises:
        ValueError: names the fields.
    """
    amount = tokens * wanted.top_k * len(wanted.sides)
    if amount > LARGEST_TOP_K:
        raise ValueError(
            f"return_top_k: {wanted.top_k} tokens of {len(wanted.sides)} sides for each of up to {tokens} output "
            f"tokens are {amount}, more than the {LARGEST_TOP_K} that one answer may have; lower return_top_k, "
            "top_k_of or max_new_tokens."
        )
